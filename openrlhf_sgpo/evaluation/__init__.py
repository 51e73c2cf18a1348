"""What policies are worth: between the rounds of a run, on benchmarks before judges, against each other; and pages that show it."""
