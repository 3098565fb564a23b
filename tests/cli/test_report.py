import pytest

from page_reader import Page
from run_events import config_event, train_event, whole_run, write_run


def read(path):
    return Page(path.read_text(encoding="utf-8"))


def test_a_real_run(lowtide, model_dir, task, tmp_path):
    out = tmp_path / "out"
    trained = lowtide(
        "train", "--model", model_dir, "--data", task, "--output", out, "--max-steps", 4, "--device", "cpu", "--optimizer", "lomo",
        "--dtype", "float32", "--eval-fraction", 0.1,
    )  # fmt: skip
    assert trained.code == 0
    result = lowtide("report", out)
    assert result.code == 0 and result.out == f"The report is in {out / 'report.html'}.\n" and result.err == []
    found = read(out / "report.html")
    assert found.loads() == []
    assert len(found.trace("loss", "training, each step")["y"]) == 4
    assert len(found.trace("loss", "held out")["y"]) == 2
    assert found.trace("memory-by-kind", "weights")["x"][0] > 0
    for text in ("finished", "4 of 4", str(model_dir), "transformers", "optimizer", "Peak memory, measured"):
        assert text in found.text, text
    assert lowtide("report", out).code == 0  # written anew


def test_a_torn_last_line_and_lines_that_are_nothing(lowtide, tmp_path):
    out = write_run(tmp_path / "run", [config_event(), train_event(1), train_event(2)])
    with (out / "metrics.jsonl").open("a") as file:
        file.write('nothing\n[1, 2]\n{"event": "train", "step": 3, "lo')
    assert lowtide("report", out).code == 0
    found = read(out / "report.html")
    assert found.trace("loss", "training, each step")["x"] == [1, 2]
    assert "2 lines of the metrics could not be read" in found.text


def test_two_runs_of_the_same_name(lowtide, tmp_path):
    a = write_run(tmp_path / "a" / "run", whole_run())
    b = write_run(tmp_path / "b" / "run", whole_run(3), settings="model: tiny\noptimizer: sgd\n")
    assert lowtide("report", a, b, "--output", tmp_path / "two.html").code == 0
    found = read(tmp_path / "two.html")
    assert len(found.trace("loss", "training, b/run")["x"]) == 3
    assert "sgd" in found.text and not (a / "report.html").exists()


def test_a_run_beside_itself_and_without_config(lowtide, tmp_path):
    run = write_run(tmp_path / "run", whole_run(), settings=None)
    assert lowtide("report", run, run).code == 0
    assert "Both runs have the same settings" in read(run / "report.html").text


def test_a_run_that_has_only_begun(lowtide, tmp_path):
    run = write_run(tmp_path / "run", [])
    assert lowtide("report", run).code == 0
    assert "No step has been recorded yet" in read(run / "report.html").text


def test_what_is_no_run(lowtide, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "metrics.jsonl").write_bytes(b"\xff\x00\n\nhello\n")
    for name, message in (
        ("missing", f"there is no directory {tmp_path / 'missing'}"),
        ("file", f"{tmp_path / 'file'} is not a directory: name the output directory of a run"),
        ("empty", f"there is no metrics.jsonl in {tmp_path / 'empty'}: it is not the output directory of a run"),
        ("garbage", f"{tmp_path / 'garbage' / 'metrics.jsonl'} does not hold the metrics of a run"),
    ):
        result = lowtide("report", tmp_path / name)
        assert (result.code, result.err) == (2, [f"lowtide: error: {message}"])


@pytest.mark.parametrize("where", ["notes.txt", ".", "none/report.html"])
def test_only_a_report_is_overwritten(lowtide, tmp_path, where):
    run = write_run(tmp_path / "run", whole_run())
    (tmp_path / "notes.txt").write_text("precious")
    result = lowtide("report", run, "--output", tmp_path / where)
    assert result.code == 2 and len(result.err) == 1
    assert (tmp_path / "notes.txt").read_text() == "precious"
