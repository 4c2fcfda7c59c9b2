import re
from pathlib import Path

import pytest

from shoal.driver.cli import main
from shoal.driver.config import make_config
from shoal.driver.data.config import make_processor_config
from shoal.driver.jobs.config import JobConfig, load_job, make_job
from shoal.driver.jobs.outcome import Exit

BASE = {"input": "in.jsonl", "output": "out.jsonl", "engine": {"model": "m"}}


def test_defaults_and_lists():
    job = make_job(BASE)
    assert job.input == ["in.jsonl"]
    assert not job.is_folder
    assert job.error_limit(100) == float("inf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nonsense": 1}, "nonsense: Extra inputs"),
        ({"output": "out.txt"}, r"output must end in .jsonl, .parquet or /, got 'out.txt'"),
        ({"output": " "}, "output must name a file"),
        ({"input": []}, "input: List should have at least 1 item"),
        ({"replicas": 0}, r'replicas must be a number from 1 on, or "auto", got 0'),
        ({"max_errors": "many"}, "max_errors must be a number of rows"),
        ({"max_errors": "-1"}, "max_errors"),
        ({"max_errors": "1.5"}, "max_errors"),
        ({"max_errors": "nan%"}, "max_errors"),
        ({"max_errors": "inf%"}, "max_errors"),
        ({"engine": {"modle": "m"}}, "model is missing"),
        ({"engine": {"model": "m", "max_num_seq": 2}}, "unknown engine argument 'max_num_seq'; did you mean"),
        ({"prompt_column": ""}, "prompt_column must name a column"),
        ({"sampling_params": {"max_token": 5}}, "sampling_params: .*'max_token'; did you mean 'max_tokens'"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params: temperature must be non-negative, got -1"),
        ({"sampling_params": {"top_k": "5"}}, "sampling_params: top_k must be an integer"),
        ({"sampling_params": {"logit_bias": [5]}}, "sampling_params: logit_bias must be a dict"),
        ({"sampling_params": {"min_tokens": 9, "max_tokens": 5}}, "sampling_params: min_tokens must be less"),
        ({"sampling_params": {"stop": {"a"}}}, "sampling_params: .*set is not JSON"),
        ({"engine": {"model": "m", "max_solo_deaths": 3}}, "engine: max_solo_deaths=3 has no effect: .* solo_deaths"),
        ({"engine": {"model": "m", "enable_sleep_mode": True}}, "engine: enable_sleep_mode=True has no effect"),
        ({"engine": {"model": "m", "scheduling_policy": "priority"}}, "engine: scheduling_policy='priority' has no"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        make_job({**BASE, **fields})


def test_a_config_of_a_pipeline_refuses_the_same():
    for fields, message in (
        ({"sampling_params": {"max_token": 5}}, "sampling_params: .*'max_token'; did you mean 'max_tokens'"),
        ({"engine": {"model": "m", "max_solo_deaths": 3}}, "engine: max_solo_deaths=3 has no effect: .* solo_deaths"),
        ({"engine": make_config(model="m", enable_sleep_mode=True)}, "engine: enable_sleep_mode=True has no effect"),
    ):
        with pytest.raises(ValueError, match=message):
            make_processor_config({"engine": {"model": "m"}, **fields})


def test_what_rows_or_the_model_may_complete_is_no_mistake():
    """Rows may have a max_tokens of their own, and the model's generation_config too."""
    for sampling in ({"min_tokens": 100}, {"max_tokens": None}, {"top_p": None}, {"logit_bias": {"5": 200}}):
        assert make_job({**BASE, "sampling_params": sampling}).sampling_params == sampling
    plain = {"model": "m", "scheduling_policy": "fcfs", "enable_sleep_mode": False}
    assert make_job({**BASE, "engine": plain}).engine.model == "m"


@pytest.mark.parametrize("command", ["run-batch", "plan"])
def test_flags_without_effect_are_refused_and_not_in_the_help(command, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x"}\n')
    where = [str(source)] if command == "plan" else ["-i", str(source), "-o", str(tmp_path / "out.jsonl")]
    for flags, said in (
        (["--max-solo-deaths", "5"], "max_solo_deaths=5 has no effect"),
        (["--enable-sleep-mode"], "enable_sleep_mode=True has no effect"),
        (["--scheduling-policy", "priority"], "scheduling_policy='priority' has no effect"),
        (["--sampling-params", '{"max_token": 5}'], "did you mean 'max_tokens'"),
    ):
        assert main([command, *where, "--model", "m", *flags]) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--max-num-seqs" in text
    for flag in ("--max-solo-deaths", "--enable-sleep-mode", "--scheduling-policy"):
        assert flag not in text


def test_error_limits():
    assert make_job({**BASE, "max_errors": 7}).error_limit(1000) == 7
    assert make_job({**BASE, "max_errors": "2.5%"}).error_limit(1000) == 25


def test_folder_output(tmp_path):
    assert make_job({**BASE, "output": "answers/"}).is_folder
    assert make_job({**BASE, "output": str(tmp_path)}).is_folder
    assert not make_job({**BASE, "output": "x", "output_format": "parquet"}).is_folder


def test_a_file_and_changes_over_it(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("input: [a.jsonl, b.jsonl]\noutput: o.jsonl\nengine: {model: m, seed: 3, max_num_seqs: 5}\n")
    job = load_job(str(path), {"output": "other.jsonl", "engine": {"seed": 4}})
    assert job.input == ["a.jsonl", "b.jsonl"]
    assert job.output == "other.jsonl"
    assert (job.engine.seed, job.engine.max_num_seqs) == (4, 5)
    for text in ("[1]", "{", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match="job file"):
            load_job(str(path), {})
    with pytest.raises(ValueError, match="cannot be read"):
        load_job(str(tmp_path / "none.yaml"), {})


def test_the_manual_lists_every_flag():
    manual = (Path(__file__).resolve().parents[3] / "docs" / "jobs.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in manual.splitlines() if line.startswith("| `-")}
    for name, field in JobConfig.model_fields.items():
        if name == "engine":
            continue
        line = next(row for flag, row in rows.items() if f"`--{name.replace('_', '-')}`" in flag)
        assert " ".join(field.description.split()) in line
        if not field.is_required():
            default = field.get_default(call_default_factory=True)
            assert f"| {'none' if default is None else default} |" in line
    assert set(map(str, map(int, Exit))) <= set(re.findall(r"\b\d+\b", manual.partition("| code |")[2][:1500]))
