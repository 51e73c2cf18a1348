"""What is measured of a policy between the rounds of a run."""
