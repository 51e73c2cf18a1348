"""A script for TRL's DPOTrainer, made into SGPO by changing its import and adding one setting (marked).

python examples/trl_dpo.py --model_name_or_path MODEL --dataset_name PAIRS.jsonl --output_dir FOLDER
    [--algorithm_settings '{"radius": 0.05}'] [any other setting of TRL's DPOConfig, ModelConfig and ScriptArguments]
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from openrlhf_sgpo.trl import DPOConfig, DPOTrainer  # was: from trl import DPOConfig, DPOTrainer

script, args, model = TrlParser((ScriptArguments, DPOConfig, ModelConfig)).parse_args_and_config()
pairs = load_dataset("json", data_files=script.dataset_name, split="train")
trainer = DPOTrainer(model.model_name_or_path, args=args, train_dataset=pairs, peft_config=get_peft_config(model))
trainer.train()
trainer.save_model(args.output_dir)
