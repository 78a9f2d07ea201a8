"""Every wrong call: one sentence on stderr that names the value, exit code 2, nothing changed."""

import json
import re
import zlib

import numpy as np
import pytest
from command_lines import TINY, snapshot

from launch import evaluate, processes, sample, train

COMMANDS = {"train": train, "sample": sample, "evaluate": evaluate}


@pytest.fixture
def refuse(capsys, caplog):
    """Calls a command in this process and returns its sentence."""

    def call(command, *args, code=2):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            COMMANDS[command].main([f"launch.{command}", *map(str, args)])
        err = capsys.readouterr().err
        assert exit_.value.code == code, err
        assert err.count("\n") == 1, err
        assert err.startswith(f"launch.{command}: "), err
        assert err.rstrip().endswith((".", "?")), err
        assert "Traceback" not in err
        assert not re.search(r"<class|object at 0x", err), err
        return err.removeprefix(f"launch.{command}: ").strip()

    return call


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--config=nosuch"], ["'nosuch'", "digits", "hypergrid"]),
        (["--config", "nosuch"], ["'nosuch'", "digits"]),
        (["--config=launch/configs/none.py"], ["launch/configs/none.py"]),
        (["--config="], ["config is ''"]),
        ([], ["--config is missing", "digits"]),
        (["--config=hypergrid", "--config.sides=3"], ["'sides'", "side", "batch_size"]),
        (["--config=hypergrid", "--config.sides", "3"], ["'sides'"]),
        (["--config=hypergrid", "--config.side=big"], ["config.side", "'big'", "int"]),
        (["--config=hypergrid", "--config.side", "big"], ["config.side", "'big'", "int"]),
        (["--config=hypergrid", "--config.side=1.5"], ["config.side", "'1.5'", "int"]),
        (["--config=hypergrid", "--config.batch_size=0"], ["batch_size is 0", "at least 1"]),
        (["--config=hypergrid", "--config.num_steps=-3"], ["num_steps is -3"]),
        (["--config=hypergrid", "--config.log_every=0"], ["log_every is 0"]),
        (["--config=hypergrid", "--config.checkpoint_every=-1"], ["checkpoint_every is -1"]),
        (["--config=hypergrid", "--config.seed=-1"], ["seed is -1"]),
        (["--config=hypergrid", "--config.seed=99999999999"], ["seed is 99999999999"]),
        (["--config=hypergrid", "--config.backend=tpu"], ["'tpu'", "pmap", "shard_map"]),
        (["--config=hypergrid", "--config.ema_decay=1"], ["ema_decay is 1"]),
        (["--config=hypergrid", "--config.epsilon=2"], ["epsilon is 2"]),
        (["--config=hypergrid", "--config.hidden_features=()"], ["hidden_features is ()"]),
        (["--config=hypergrid", "--config.hidden_features=('a',)"], ["hidden_features is ('a',)"]),
        (["--config=hypergrid", "--config.num_devices=99"], ["num_devices is 99"]),
        (["--config=hypergrid", "--config.num_devices=3"], ["batch_size is 16", "3 devices"]),
        (["--config=hypergrid", "--config.recipe=none"], ["'none'", "digits"]),
        (["--config=hypergrid", "--config.recipe=digits"], ["'"]),
        (["--config=hypergrid", "--unknown=3"], ["unknown"]),
        (["--config=hypergrid", "--overwrite=perhaps"], ["perhaps"]),
        (["--config=hypergrid", "extra"], ["'extra'"]),
        (["--config=hypergrid", "--recipe_module=no.such"], ["'no.such'"]),
        (["--config=hypergrid", "--recipe_module="], ["recipe_module is ''"]),
        (["--config=hypergrid", "--recipe_module=json"], ["'json'", "recipe"]),
        (["--config=hypergrid", "--num_processes=2"], ["num_processes is 2", "coordinator"]),
        (["--config=hypergrid", "--num_processes=0"], ["num_processes is 0"]),
        (["--config=hypergrid", "--process_id=1"], ["process_id is 1"]),
        (
            ["--config=hypergrid", "--num_processes=2", "--coordinator_address=here"],
            ["coordinator_address is 'here'", "host:port"],
        ),
    ],
)
def test_train_refuses(refuse, tmp_path, args, words):
    sentence = refuse("train", *args, f"--workdir={tmp_path / 'run'}")
    assert all(word in sentence for word in words), sentence
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["localhost:1", "localhost:99999", "no.such.host.invalid:80"])
def test_a_coordinator_that_does_not_answer_is_named(refuse, tmp_path, monkeypatch, address):
    monkeypatch.setattr(processes, "_CONNECT_SECONDS", 0.3)
    pair = [f"--coordinator_address={address}", "--num_processes=2", "--process_id=1"]
    assert f"'{address}'" in refuse("train", *TINY, *pair, f"--workdir={tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def get_config(:", ["SyntaxError"]),
        ("x = 3", ["get_config"]),
        ("def get_config():\n    return 1 / 0", ["ZeroDivisionError"]),
        ("def get_config():\n    return {'recipe': 'hypergrid'}", ["ConfigDict"]),
        ("def get_config():\n    raise ValueError('not mine')", ["ValueError: not mine)."]),
        ("import nosuchmodule", ["nosuchmodule"]),
        (
            "import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict()",
            ["config.recipe is None"],
        ),
    ],
)
def test_a_config_file_that_cannot_be_loaded_is_refused(refuse, tmp_path, text, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    sentence = refuse("train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert all(word in sentence for word in words), sentence
    assert "Traceback" not in sentence


@pytest.mark.parametrize("text", ["def recipe(:", "1 / 0", "recipe = 3", "import nosuchmodule"])
def test_a_recipe_module_that_cannot_be_loaded_is_refused(refuse, tmp_path, monkeypatch, text):
    name = f"mine_{zlib.crc32(text.encode())}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    args = ["--config=hypergrid", f"--recipe_module={name}", f"--workdir={tmp_path / 'run'}"]
    assert f"recipe_module is '{name}'" in refuse("train", *args)


def test_a_workdir_that_cannot_be_used_is_refused(refuse, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine")
    before = snapshot(tmp_path)
    assert str(file) in refuse("train", *TINY, f"--workdir={file}")
    assert str(file) in refuse("train", *TINY, f"--workdir={file}/below/it")
    assert "'thesis.tex'" in refuse("train", *TINY, f"--workdir={foreign}")
    assert "'thesis.tex'" in refuse("train", *TINY, f"--workdir={foreign}", "--overwrite")
    assert "--workdir is missing" in refuse("train", *TINY)
    assert "workdir is ''" in refuse("train", *TINY, "--workdir=")
    assert "x" * 300 in refuse("train", *TINY, f"--workdir={tmp_path}/{'x' * 300}")
    for command in ("sample", "evaluate"):
        assert str(file) in refuse(command, f"--workdir={file}/below")
        assert str(foreign) in refuse(command, f"--workdir={foreign}")
        assert str(tmp_path / "none") in refuse(command, f"--workdir={tmp_path / 'none'}")
        assert "--workdir is missing" in refuse(command)
    assert snapshot(tmp_path) == before


def test_a_call_that_contradicts_the_run_is_refused(refuse, finished_copy):
    before = snapshot(finished_copy)
    workdir = f"--workdir={finished_copy}"
    for change, words in [
        ("--config.side=9", ["config.side is 9", "8"]),
        ("--config.seed=1", ["config.seed is 1", "0"]),
        ("--config.batch_size=32", ["config.batch_size is 32", "16"]),
        ("--config.hidden_features=(32,)", ["config.hidden_features is (32,)", "(16,)"]),
        ("--config.learning_rate_decay_steps=7", ["learning_rate_decay_steps is 7", "40"]),
        ("--config.num_steps=30", ["config.num_steps is 30", "step 40"]),
    ]:
        others = [arg for arg in TINY if not arg.startswith(change.split("=")[0])]
        sentence = refuse("train", *others, change, workdir)
        assert all(word in sentence for word in words), sentence
    assert "recipe is 'digits'" in refuse("train", "--config=digits", workdir)
    assert snapshot(finished_copy) == before


@pytest.mark.parametrize(
    ("command", "args", "words"),
    [
        ("sample", ["--num_samples=0"], ["num_samples is 0", "at least 1"]),
        ("sample", ["--num_samples=many"], ["num_samples", "many"]),
        ("sample", ["--num_samples=99999999999"], ["num_samples is 99999999999"]),
        ("sample", ["--seed=-1"], ["seed is -1"]),
        ("sample", ["--seed=4294967296"], ["seed is 4294967296"]),
        ("sample", ["--output=samples.csv"], ["samples.csv", ".npz"]),
        ("sample", ["--output=/no/such/folder/s.npz"], ["/no/such/folder/s.npz"]),
        ("sample", ["--output=/"], ["'/'"]),
        ("sample", ["--checkpoint=35"], ["'35'", "newest", "best", "40"]),
        ("sample", ["--checkpoint=latest"], ["'latest'", "newest"]),
        ("sample", ["--checkpoint=²"], ["'²'"]),
        ("sample", ["--config=hypergrid"], ["config"]),
        ("sample", ["extra"], ["'extra'"]),
        ("evaluate", ["--seed=-1"], ["seed is -1"]),
        ("evaluate", ["--seed=x"], ["seed", "x"]),
        ("evaluate", ["--json=/no/such/folder/f.json"], ["/no/such/folder/f.json"]),
        ("evaluate", ["--json="], ["json is ''"]),
        ("evaluate", ["--checkpoint=11"], ["'11'", "newest"]),
        ("evaluate", ["--unknown"], ["unknown"]),
    ],
)
def test_looking_commands_refuse(refuse, finished, command, args, words):
    before = snapshot(finished)
    sentence = refuse(command, f"--workdir={finished}", *args)
    assert all(word in sentence for word in words), sentence
    assert snapshot(finished) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], ["config.json"]),
        (lambda text: "", ["config.json"]),
        (lambda text: "[1, 2]", ["config.json", "recipe"]),
        (lambda text: "{}", ["config.json", "recipe"]),
        (lambda text: text.replace('"hypergrid"', '"none"'), ["'none'"]),
        (lambda text: text.replace('"side": 8', '"side": "big"'), ["config.json", "side is 'big'"]),
        (lambda text: text.replace('"side": 8', '"side": 0'), ["config.json", "side is 0"]),
        (lambda text: text.replace('"side"', '"sides"'), ["config.json", "'sides'"]),
    ],
)
def test_a_damaged_config_is_refused(refuse, finished_copy, damage, words):
    path = finished_copy / "config.json"
    path.write_text(damage(path.read_text()))
    before = snapshot(finished_copy)
    for command, args in (("train", TINY), ("sample", ()), ("evaluate", ())):
        sentence = refuse(command, *args, f"--workdir={finished_copy}")
        assert all(word in sentence for word in words), sentence
    assert snapshot(finished_copy) == before


def test_a_config_of_an_older_version_takes_defaults(finished_copy, capsys):
    path = finished_copy / "config.json"
    settings = json.loads(path.read_text())
    del settings["chunk_size"]
    path.write_text(json.dumps(settings))
    with pytest.raises(SystemExit) as exit_:
        evaluate.main(["launch.evaluate", f"--workdir={finished_copy}"])
    assert exit_.value.code == 0, capsys.readouterr().err


def test_damage_of_what_a_resume_reads_is_refused(refuse, finished_copy):
    longer = [*TINY, "--config.num_steps=60", f"--workdir={finished_copy}"]
    metrics = finished_copy / "metrics.jsonl"
    good = metrics.read_text()
    metrics.write_text(good.replace('{"step": 10', '{"stop": 10'))
    before = snapshot(finished_copy)
    assert "line 2" in refuse("train", *longer)
    assert snapshot(finished_copy) == before
    metrics.write_text(good)
    for path in (finished_copy / "checkpoints").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    before = snapshot(finished_copy)
    workdir = f"--workdir={finished_copy}"
    for command, args in (("train", longer), ("sample", [workdir]), ("evaluate", [workdir])):
        capture = refuse_with_warnings(command, args)
        assert "30, 40" in capture
        assert "cannot be read" in capture
    assert snapshot(finished_copy) == before


def refuse_with_warnings(command, args):
    """The sentence of a command that has warned of damage before."""
    import contextlib
    import io

    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as exit_:
        COMMANDS[command].main([f"launch.{command}", *args])
    assert exit_.value.code == 2
    return err.getvalue().splitlines()[-1]


def test_a_run_without_a_checkpoint_has_nothing_to_draw(refuse, finished_copy):
    import shutil

    shutil.rmtree(finished_copy / "checkpoints")
    for command in ("sample", "evaluate"):
        assert "no checkpoint yet" in refuse(command, f"--workdir={finished_copy}")


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["--help", "-h", "--h"])
def test_help_mentions_every_flag(command, flag, capsys):
    with pytest.raises(SystemExit) as exit_:
        COMMANDS[command].main([f"launch.{command}", flag])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert f"python -m launch.{command}" in out
    for name in COMMANDS[command].FLAGS:
        assert f"--{name}: " in out


@pytest.mark.parametrize("config", ["hypergrid", "digits"])
def test_help_of_a_config_explains_its_fields(config, capsys):
    with pytest.raises(SystemExit) as exit_:
        train.main(["launch.train", f"--config={config}", "--config.seed=7", "--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "seed = 7: seed of everything random" in out
    for name in ("num_steps", "batch_size", "log_every", "checkpoint_every", "hidden_features"):
        assert re.search(rf"^  {name} = .+: \w+", out, re.MULTILINE), name
    assert not re.search(r"^  \w+ = .*: $", out, re.MULTILINE)  # a field without a line of help


def test_a_field_may_stand_before_the_config(capsys):
    args = ["--config.side=9", "--config.hidden_features=(7,)", "--config=hypergrid", "--help"]
    with pytest.raises(SystemExit) as exit_:
        train.main(["launch.train", *args])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert "side = 9: " in out
    assert "hidden_features = (7,): " in out


def test_a_second_call_in_one_process_starts_anew(finished, tmp_path, capsys):
    outputs = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for output, more in zip(outputs, (["--num_samples=3", "--seed=5"], []), strict=True):
        with pytest.raises(SystemExit) as exit_:
            sample.main(["launch.sample", f"--workdir={finished}", f"--output={output}", *more])
        assert exit_.value.code == 0
    assert [len(np.load(output)["positions"]) for output in outputs] == [3, 64]
