"""What policies are worth: between the rounds of a run, on benchmarks, against each other; and pages that show it."""
