"""Every command refuses every number that is out of its field's range, and every default is in it."""

import pytest

from openrlhf_sgpo import algorithms, flags, run_settings
from openrlhf_sgpo.benchmarks import settings as evaluate
from openrlhf_sgpo.benchmarks import tasks
from openrlhf_sgpo.comparison import judge_check
from openrlhf_sgpo.comparison import settings as compare
from openrlhf_sgpo.refinement import settings as refine

COMMANDS = {
    "evaluate": (lambda argv: evaluate.load(["--tasks", *tasks.names(), *argv]), evaluate.sections()),
    "compare": (lambda argv: compare.read_settings(argv, {}), {"": compare.CompareSettings}),
    "refine": (refine.load, {"": refine.RefineSettings}),
    "judge-check": (judge_check.load, {"": judge_check.JudgeCheckSettings}),
}
for name in algorithms.names():
    COMMANDS[f"train {name}"] = (
        lambda argv, name=name: run_settings.load(["--algo", name, *argv]),
        run_settings.sections(algorithms.get(name)),
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_out_of_range_is_refused(command):
    load, sections = COMMANDS[command]
    instances = {prefix: make() for prefix, make in sections.items()}
    assert flags.out_of_range(instances) == []
    argv, expected = [], set()
    for flag, (_, default, metadata) in flags._flags(instances).items():
        span = metadata.get("range", flags.Range())
        if str(span):
            outside = [bound for bound in (span.above, span.below) if bound is not None]
            outside += [span.low - 1] if span.low is not None else []
            count = len(default) if isinstance(default, tuple) else 1
            argv += [f"--{flag}", *[str(outside[0])] * count]
            expected.add(f"--{flag}")
    with pytest.raises(flags.SettingsError) as error:
        load(argv)
    refused = {problem.partition(":")[0] for problem in error.value.args if " is out of range, use " in problem}
    assert refused == expected and len(refused) >= 8
