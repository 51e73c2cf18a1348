"""A script for OpenRLHF's DPOTrainer, made into SGPO by changing two lines (marked). Works with or without a GPU.

python examples/drop_in.py --model.model_name_or_path MODEL --data.dataset PAIRS.jsonl --ckpt.output_dir FOLDER
"""

import sys
from types import SimpleNamespace

from datasets import load_dataset
from transformers import AutoTokenizer

from openrlhf_sgpo import SGPOTrainer  # was: from openrlhf.trainer.dpo_trainer import DPOTrainer
from openrlhf_sgpo.openrlhf import RewardDataset, build_strategy, load_actor
from openrlhf_sgpo.run_settings import load

config, _ = load(["--algo", "dpo", *sys.argv[1:]])
strategy = build_strategy(config)
tokenizer = AutoTokenizer.from_pretrained(config.model.model_name_or_path)
model = load_actor(config.model.model_name_or_path, config, strategy, trainable=True)
reference = load_actor(config.ref.model_name_or_path, config, strategy, trainable=False)
pairs = load_dataset("json", data_files=config.data.dataset, split="train")
strategy.args.data = SimpleNamespace(prompt_key="prompt", chosen_key="chosen", rejected_key="rejected")
dataset = RewardDataset(pairs, tokenizer, config.data.max_len, strategy, is_dpo=True, num_processors=1)
loader = strategy.setup_dataloader(dataset, config.train.micro_batch_size, collate_fn=dataset.collate_fn)
schedule = {"lr_scheduler": "constant", "scheduler_steps": len(dataset) // config.train.batch_size}
settings = {"optim": "adam", "adam": vars(config.adam), "max_norm": config.max_norm, **schedule}
(model, optimizer, scheduler), reference = strategy.prepare((model, settings), reference)
# was: DPOTrainer(
trainer = SGPOTrainer(model, reference, strategy, tokenizer, optimizer, loader, None, scheduler, max_epochs=1)
trainer.fit(strategy.args)
strategy.save_model(model, tokenizer, config.ckpt.output_dir)
