"""Log-probabilities, scoring, and the pair trainer on OpenRLHF's DPOTrainer and strategy."""
