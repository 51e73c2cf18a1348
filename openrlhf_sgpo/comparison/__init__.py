"""The command compare: runs head to head, from training a suite of them to figures with their certainty."""
