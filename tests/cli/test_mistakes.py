"""Commands that cannot be carried out, without a run that there is."""

import shutil
import subprocess
import sys

import pytest
from processes import ROOT, assert_mistake, in_a_process, in_two_processes

from mtl_jax import configuration

SMALL = ("earth_digits:single_digit", "--smoke")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("trian", "earth_digits"),
        ("train",),
        ("train", "earth_digits", "--sede", "3"),
        ("train", "earth_digits", "--seed", "three"),
        ("train", "earth_digits", "--devices", "many"),
        ("eval", "run", "--step", "last"),
        ("compare",),
    ],
    ids=str,
)
def test_a_command_line_that_cannot_be_read(mistake, arguments):
    assert "--help" in mistake(*arguments)


@pytest.mark.parametrize("command", ["train", "show"])
def test_an_unknown_config_lists_the_known(mistake, command):
    error = mistake(command, "earth_digit")
    assert "unknown config 'earth_digit'" in error
    for name in configuration.known_configs():
        assert name in error


def test_an_unknown_variant_lists_the_known(mistake):
    error = mistake("train", "earth_digits:moon")
    assert "'moon'" in error
    assert "shared_router" in error


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("trunk.moe.num_expert=4", "did you mean 'num_experts'?"),
        ("seed=three", "seed is 'three' of type str; it must be int"),
        ("num_steps=1.5", "it must be int"),
        ("seed", "not of the form path=value"),
        ("num_steps=0", "num_steps is 0; it must be at least 1"),
        ("evaluation_examples=0", "evaluation_examples is 0"),
        ("checkpoints_kept=0", "checkpoints_kept is 0; it must be at least 1"),
        ("tasks.digit.name=letter", "task 'letter' has no labelled source"),
        ("mixture.components.digits.tasks=()", "'digit' has no labelled source"),
        ("mixture.components.digits.weight=0", "'digit' has no labelled source"),
        ("mixture.components.digits.tasks=('digit','moon')", "unknown tasks ['moon']"),
        ("mixture.components.digits.tasks=('digit','digit')", "name each task once"),
        ("mixture.components.digits.weight=-1", "digits.weight is -1.0; it must be"),
        ("mixture.components.digits.weight=1e400", "digits.weight is inf"),
        ("tasks.digit.name=all", "'all' is no name for a task"),
        ("tasks.digit.name=a/b", "'a/b' is no name for a task"),
        ("tasks.digit.metrics=()", "tasks.digit.metrics are []; give at least one"),
        ("tasks.digit.target=letter", "no field 'letter', which task 'digit' needs"),
        ("mixture.components.digits.input_field=x", "no field 'x'"),
        ("mixture.components.digits.input_field=digit", "height, width and channels"),
        ("mixture.components.digits.train.split=dev", "digits.train: split 'dev' is"),
        ("tasks.digit.head.num_classes=9", "head of task 'digit' predicts shape (9,)"),
        ("trunk.num_tasks=3", "trunk.num_tasks is 3, but there are 1 tasks"),
        ("trunk.patch_size=8", "patch_size is 8"),
        ("trunk.width=-4", "trunk.width is -4; it must be at least 1"),
        ("trunk.width=1000000000000", "it must be at least 1 and at most"),
        ("trunk.depth=0", "trunk.depth is 0; it must be at least 1"),
        ("trunk.depth=100000", "trunk.depth is 100000; it must be"),
        ("trunk.depth=1000", "more than 256 take too long, so set trunk.scan=True"),
        ("trunk.num_heads=-1", "trunk.num_heads is -1"),
        ("trunk.num_heads=5", "num_heads=5 does not divide the width 24"),
        ("trunk.patch_size=0", "trunk.patch_size is 0"),
        ("trunk.mlp_ratio=0", "trunk.mlp_ratio is 0"),
        ("trunk.num_channels=-3", "trunk.num_channels is -3"),
        ("trunk.dtype=float33", "trunk.dtype is 'float33'; use a floating-point"),
        ("trunk.dtype=complex64", "trunk.dtype is 'complex64'; use a floating-point"),
        ("trunk.moe.group_size=0", "group_size is 0; it must be at least 1"),
        ("trunk.moe.num_experts=0", "trunk.moe.num_experts is 0"),
        ("trunk.moe.num_selected=9", "num_selected is 9; it must be at least 1 and at"),
        ("trunk.moe.expert_hidden=-1", "trunk.moe.expert_hidden is -1"),
        (
            "trunk.moe.router.load_weight=-1",
            "router.load_weight is -1.0; it must be at",
        ),
        (
            "trunk.moe.router.noise_std=1e400",
            "router.noise_std is inf; it must be finite",
        ),
        ("trunk.moe.dtype=bfloat16", "set trunk.dtype instead"),
        ("trunk.moe.num_tasks=1", "set trunk.num_tasks instead"),
        ("tasks.digit.head.num_classes=0", "tasks.digit.head.num_classes is 0"),
        ("tasks.digit.head.dtype=int8", "tasks.digit.head.dtype is 'int8'"),
        ("optimizer.learning_rate=1e400", "optimizer.learning_rate is inf"),
        ("optimizer.learning_rate=-1", "optimizer.learning_rate is -1.0; it must be"),
        ("optimizer.num_steps=3", "optimizer.num_steps is 3; leave it out"),
        ("aggregator.num_tasks=3", "aggregator.num_tasks is 3; leave it out"),
        ("num_steps=10000000000", "it must be less than 2**31"),
        ("num_steps=1000000000000000000000", "it must be less than 2**63"),
        (
            "mixture.batch_size=1000000000000",
            "mixture.batch_size is 1000000000000; the",
        ),
        ("evaluation_batch_size=1000000000000", "evaluation_batch_size is 1000000"),
        ("rules.batch=nope", "rules.batch is 'nope'; choose from the mesh axes data,"),
        ("rules.batch=model", "rules.batch is 'model'; choose from"),
        ("rules.tokens=('data','data')", "each at most once"),
        ("evaluation_batch_size=30", "evaluation_batch_size is 30"),
        ("evaluation_batch_size=4", "evaluation_batch_size is 4"),
        ("mixture.batch_size=33", "mixture.batch_size is 33"),
        ("mixture.temperature=0", "mixture.temperature is 0"),
        ("mesh.expert=3", "do not divide 8 devices"),
        ("mesh.data=0", "must be positive"),
        ("trunk.moe.num_experts=6", "of size 6 does not divide"),
    ],
)
def test_a_config_that_does_not_fit(mistake, assignment, expected):
    assert expected in mistake("train", *SMALL, "--set", assignment)


@pytest.mark.parametrize("number", [0, -3, 10**9])
def test_devices_there_cannot_be(mistake, number):
    error = mistake("train", *SMALL, "--devices", number)
    assert f"--devices is {number}; it must be at least 1" in error


def test_a_platform_there_is_not(empty_folder, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "abacus")
    finished = in_a_process("show", *SMALL, cwd=empty_folder)
    assert_mistake(finished, "JAX has no devices")


def test_output_that_nobody_reads():
    command = [sys.executable, str(ROOT / "run.py"), "show", *SMALL]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_a_loss_defined_in_the_config(mistake, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "from mtl_jax.configuration import load_config\n"
        "def own_loss(prediction, target):\n"
        "    return prediction, target\n"
        "def main():\n"
        "    config = load_config('earth_digits:single_digit', smoke=True)\n"
        "    config.tasks[0].loss = own_loss\n"
        "    return config\n"
        "VARIANTS = {'main': main}\n"
    )
    for command in ("train", "show"):
        error = mistake(command, path)
        assert "tasks.digit.loss is own_loss, which config.json cannot name" in error


def test_a_config_that_fails(mistake, tmp_path):
    path = tmp_path / "own.py"
    path.write_text("import fiddle\nimport no_such_module\n")
    assert "own.py, line 2: ModuleNotFoundError" in mistake("train", path)


def test_a_mesh_that_does_not_divide_the_devices(empty_folder):
    finished = in_a_process("train", *SMALL, "--devices", 3, cwd=empty_folder)
    assert_mistake(finished, "do not divide 3 devices")
    assert list(empty_folder.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 100_000])
def test_an_empty_or_truncated_data_file(tmp_path, empty_folder, kept):
    copy = tmp_path / "copy"
    for name in ("mtl_jax", "configs"):
        shutil.copytree(
            ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "run.py", copy)
    digits = copy / "mtl_jax" / "data" / "arrays" / "digits.npz"
    digits.write_bytes(digits.read_bytes()[:kept])
    finished = in_a_process("train", *SMALL, folder=copy, cwd=empty_folder)
    assert_mistake(finished, "digits.npz is missing or damaged")
    assert list(empty_folder.iterdir()) == []


def test_a_folder_that_cannot_be_written(mistake, empty_folder):
    (empty_folder / "file").write_text("in the way")
    error = mistake("train", *SMALL, "--workdir", "file/run")
    assert "cannot write to the run folder file/run" in error
    assert "choose another --workdir" in error


@pytest.mark.parametrize("content", ['{"config": "ear', "[]", ""])
def test_a_run_folder_with_a_damaged_config(mistake, empty_folder, content):
    (empty_folder / "config.json").write_text(content)
    assert "config.json is not" in mistake("train", *SMALL, "--workdir", ".")
    assert "config.json is not" in mistake("eval", ".")


def test_eval_of_a_folder_without_a_run(mistake, empty_folder):
    assert "holds no run" in mistake("eval", ".")
    assert "holds no run" in mistake("eval", "nowhere")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--process-id", 1), "some are missing; give all three"),
        (
            ("--coordinator", "a:1", "--num-processes", 2, "--process-id", 2),
            "process_id is 2",
        ),
        (
            ("--coordinator", "a", "--num-processes", 2, "--process-id", 1),
            "coordinator is 'a'; it must be HOST:PORT",
        ),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_processes_that_cannot_be(mistake, command, arguments, expected):
    assert expected in mistake(command, "earth_digits", *arguments)


def test_two_processes_make_the_same_mistake(empty_folder):
    for process in in_two_processes(
        "train", *SMALL, "--set", "mesh.expert=3", cwd=empty_folder
    ):
        assert_mistake(process, "do not divide 8 devices")
    assert list(empty_folder.iterdir()) == []
