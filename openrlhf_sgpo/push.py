"""``openrlhf-sgpo push``: a policy of a finished run, with its model card, to the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from openrlhf_sgpo import flags, keys
from openrlhf_sgpo.flags import setting
from openrlhf_sgpo.inference import stored_settings
from openrlhf_sgpo.report.model_card import write_cards
from openrlhf_sgpo.run_check import check_ended, check_round, check_rounds
from openrlhf_sgpo.run_folder import CARD, TABLE, RunFolder, write_text

KEY = "HF_TOKEN"


@dataclass
class PushSettings:
    run: str = setting("", "the folder of a run that has ended")
    to: str = setting("", "the repository on the hub, OWNER/NAME; it is created if it does not exist")
    round: int | None = setting(None, "round whose policy is shared (default: the last)", low=0)
    role: Literal["policy", "follower"] = setting(
        "policy", "policy, or follower: that of SLHF with --slhf.sharing two_adapters"
    )
    public: bool = setting(False, "let everybody see the repository; otherwise it is private")


def load(argv: Sequence[str]) -> PushSettings:
    """The settings from command-line arguments. Raises flags.SettingsError with every problem at once."""
    instances, *_ = flags.parse(argv, {"": PushSettings})
    settings: PushSettings = instances[""]
    problems = flags.out_of_range({"": settings})
    if not settings.run:
        problems.append("--run: missing, give the folder of a run")
    elif stored_settings(settings.run) is None:
        problems.append(f"--run: {settings.run} is not the folder of a run")
    try:
        validate_repo_id(settings.to)
        named = settings.to.count("/") == 1
    except HFValidationError:
        named = False
    if not named:
        problems.append(f"--to: {settings.to or 'missing'}; give OWNER/NAME, a repository on the hub")
    try:
        keys.read_key("env", KEY)
    except ValueError as error:
        problems.append(f"--to: {error}; put a token of the hub with write access into it")
    flags.refuse(problems)
    return settings


# Of what an earlier upload has left, these would be read in place of, or beside, what is uploaded now.
OF_A_MODEL = ["*.safetensors", "*.bin", "*.json", "*.jinja", "*.model", "adapter/*"]


def push_policy(settings: PushSettings) -> str:
    """Upload the weights, tokenizer and card; returns the address of the repository and who sees it.

    What is there already is not sent again, so an upload that was cut off goes on when the command is repeated. Raises
    ValueError if the run has not ended or its files have changed, if the repository is public and --public is not given, and if
    the hub cannot be reached or refuses.
    """
    run = RunFolder(settings.run, "run")
    number = _check(run, settings)
    folder = run.round(number) / settings.role
    write_cards(run, number, {})  # of a run that was written before there were cards
    api = HfApi(token=keys.read_key("env", KEY))
    try:
        api.create_repo(settings.to, private=not settings.public, exist_ok=True)
        is_private = bool(api.model_info(settings.to).private)
        if not is_private and not settings.public:
            raise ValueError(f"--to: {settings.to} is public; add --public, or choose another repository")
        _complete(folder, api)
        message = f"{run.path.name}, {settings.role} of round {number}"
        api.upload_folder(
            repo_id=settings.to,
            folder_path=folder,
            commit_message=message,
            ignore_patterns="*.partial",
            delete_patterns=OF_A_MODEL,
        )
    except OfflineModeIsEnabled:
        raise ValueError(f"--to: HF_HUB_OFFLINE is set, so {api.endpoint} is not asked; unset it") from None
    except HfHubHTTPError as error:
        raise ValueError(f"--to: {api.endpoint} refused {settings.to} ({' '.join(str(error).split())})") from error
    except (httpx.TransportError, OSError, RuntimeError) as error:
        reason = " ".join(f"{error.__cause__ or error}".split())
        raise ValueError(
            f"--to: the upload to {api.endpoint} broke off ({reason}); repeat the command, and it goes on where it was"
        ) from error
    return f"{api.endpoint}/{settings.to} ({'private' if is_private else 'public'})"


def _check(run: RunFolder, settings: PushSettings) -> int:
    """The number of the round. Raises ValueError unless the run has ended, nobody is writing to it, and it holds what it
    wrote."""
    run.check_free()
    if not (run.path / TABLE).exists():
        raise ValueError(f"--run {run.path} has not ended (there is no {TABLE}): train --resume continues it")
    check_ended(run)
    check_rounds(run, policies=0)
    numbers = run.rounds()
    number = numbers[-1] if settings.round is None else settings.round
    if number not in numbers:
        raise ValueError(f"--round: {number} is not a round of {run.path}, which has {', '.join(map(str, numbers))}")
    if settings.role == "follower" and not (run.round(number) / "follower").is_dir():
        raise ValueError("--role: the run has no weights of a follower's own; leave it out")
    check_round(run, number)
    return number


def _complete(folder: Path, api: HfApi) -> None:
    """Add the licence of the base model, as the hub states it, to a card that has none."""
    card = ModelCard.load(folder / CARD)
    base = card.data.base_model
    if card.data.license or not isinstance(base, str):
        return
    try:
        known = api.model_info(base).card_data
    except HfHubHTTPError:  # a base model that is gone, or that this key may not see
        return
    if known and known.license:
        card.data.license = known.license
        write_text(folder / CARD, str(card))
