"""The page on launching: its times against those that are set, its commands against the
parser, and its job files against themselves."""

import math
import pathlib
import re
import shlex

import pytest
import yaml

from mtl_jax import cli
from mtl_jax.sharding import distributed

PAGE = pathlib.Path(__file__).parents[2] / "docs/launch.md"
BLOCKS = re.findall(r"```(\w+)[^\n]*\n(.*?)\n```", PAGE.read_text(), re.DOTALL)
# What the shell puts for the variables of the recipes.
VARIABLES = {"$i": "1", "${hosts[0]}": "node1", "${#hosts[@]}": "4"}


def test_the_page_names_the_time_after_which_a_silent_process_is_given_up():
    (seconds,) = re.findall(
        r"after (\d+) seconds without a sign of life", PAGE.read_text()
    )
    assert int(seconds) == distributed.SILENT_SECONDS


def job_set():
    (text,) = (text for language, text in BLOCKS if language == "yaml")
    return yaml.safe_load(text)


def commands():
    """Every ``mtl-jax`` of the page, as lists of arguments."""
    found = []
    for language, text in BLOCKS:
        if language != "bash":
            continue
        text = text.replace("\\\n", " ")
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        for words in re.findall(r"mtl-jax ([^\n]*)", text):
            found.append(shlex.split(words.rstrip('"').removesuffix(" &")))
    ((container,),) = (pod(slice_)["containers"] for slice_ in replicated())
    program, *arguments = container["command"]
    assert program == "mtl-jax"
    return [*found, arguments]


def replicated():
    return [job["template"]["spec"] for job in job_set()["spec"]["replicatedJobs"]]


def pod(job):
    return job["template"]["spec"]


def test_all_recipes_are_found():
    # One machine, ssh, SLURM, Cloud TPU and GKE.
    assert len(commands()) == 5


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_every_command_is_one_that_there_is(arguments):
    options = cli._parser().parse_args(arguments)
    assert options.config.split(":")[0] == "earth_digits"
    assert options.workdir is not None
    by_hand = options.coordinator, options.num_processes, options.process_id
    # Either the cluster says who the others are, or all three are given.
    assert options.distributed == (by_hand == (None, None, None))
    if not options.distributed:
        assert re.fullmatch(r"\w+:\d+", options.coordinator)
        assert options.process_id < options.num_processes


def test_jobs_have_a_process_for_every_host_and_write_where_all_can():
    (job,) = replicated()
    topology = pod(job)["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = math.prod(int(side) for side in topology.split("x"))
    (container,) = pod(job)["containers"]
    hosts = chips / container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"] == hosts
    # JobSet starts all again; a pod or a job that did by itself would come alone.
    assert (job["backoffLimit"], pod(job)["restartPolicy"]) == (0, "Never")
    (mount,), (volume,) = container["volumeMounts"], pod(job)["volumes"]
    assert mount["name"] == volume["name"]
    (workdir,) = [
        argument.partition("=")[2]
        for argument in container["command"]
        if argument.startswith("--workdir=")
    ]
    assert workdir.startswith(f"{mount['mountPath']}/")


def test_slurm_starts_a_task_for_every_gpu():
    (text,) = (text for _, text in BLOCKS if "#SBATCH" in text)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", text, re.MULTILINE))
    assert len(options) == text.count("#SBATCH")
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert re.fullmatch(r"TERM@\d+", options["signal"])
    # SBATCH lines behind the first command are comments.
    assert lines[-1].startswith("srun mtl-jax train ")
    assert all(line.startswith("#") for line in lines[:-1])
