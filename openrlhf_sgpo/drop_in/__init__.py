"""SGPO in the trainers of others: OpenRLHF's ``DPOTrainer`` (``trainer``, ``loss``); TRL's is in ``openrlhf_sgpo.trl``."""
