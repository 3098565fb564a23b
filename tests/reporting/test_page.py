import pytest

from lowtide.reporting import page as page_module
from lowtide.reporting.history import History
from lowtide.reporting.page import content, page, plotly_script
from page_reader import Page, hash_of
from run_events import config_event, end_event, eval_event, memory_event, samples_event, train_event, whole_run

DEFAULTS = {"model": None, "optimizer": "adalomo", "lr": None, "clip": "exact"}
SETTINGS = {"model": "tiny", "optimizer": "lomo", "lr": 0.1, "clip": "exact"}
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> & \"quoted\" 'too'"


def page_of(*runs, **options):
    return Page(page(runs, DEFAULTS, **options))


def history(events, name="run", settings=SETTINGS, **options):
    return History(name, settings, events, **options)


@pytest.fixture
def short_plotly(monkeypatch):
    """Most tests do not need the five megabytes."""
    monkeypatch.setattr(page_module, "plotly_script", lambda: "window.Plotly = {react() {}};")


def test_nothing_is_loaded_and_only_the_page_s_own_scripts_may_run():
    found = page_of(history(whole_run()))
    assert found.loads() == []
    assert len(found.scripts) == 2 and found.scripts[0] == plotly_script()
    policy = found.policy()
    assert policy["default-src"] == "'none'" and policy["connect-src"] == "'none'"
    assert policy["script-src"].split() == [hash_of(script) for script in found.scripts]
    assert not [name for _, attributes in found.tags for name in attributes if name.startswith("on")]


def test_charts_and_figures_of_a_run(short_plotly):
    found = page_of(history(whole_run()))
    assert set(found.charts) == {
        "loss", "perplexity", "lr", "grad_norm", "lost_updates", "tokens_per_s", "memory", "memory-by-kind",
    }  # fmt: skip
    assert found.trace("loss", "held out")["y"] == [2.0, 1.0]
    assert found.trace("loss", "training, each step")["y"][1] == 1.5
    for text in ("finished", "10 of 10", "2.0000 → 1.0000", "1 (norm above 1)", "25.00%", "1.00 GiB"):
        assert text in found.text, text
    charts = [each for each in found.all("div") if each.get("class") == "chart"]
    assert len(charts) == len(found.charts)
    assert all(each["role"] == "img" and each["aria-label"] for each in charts)
    assert [tag for tag, _ in found.tags if tag in ("h1", "main")] == ["main", "h1"]


def test_predicted_memory_stands_beside_the_measured(short_plotly):
    found = page_of(history(whole_run()))
    weights = found.trace("memory-by-kind", "weights")
    assert weights["y"] == ["predicted", "measured"] and weights["x"] == [2**-10, 0.0]
    assert found.trace("memory-by-kind", "measured above that")["x"] == [0.0, 0.5]
    table = found.text[found.text.index("Memory by kind as a table") :]
    places = [table.index(part) for part in ("predicted", "measured", "weights", "1.00 MiB", "together", "1.00 GiB")]
    assert places == sorted(places)


def test_memory_inside_of_a_step(short_plotly):
    found = page_of(history([*whole_run()[:-1], memory_event(), end_event(10)]))
    chart = found.charts["memory-in-step"]
    stacked = [trace for trace in chart["traces"] if trace.get("stackgroup")]
    assert [trace["name"] for trace in stacked][:3] == ["Python and libraries", "weights", "gradients"]
    assert {tuple(trace["x"]) for trace in stacked} == {(0.0, 0.1, 0.2, 0.3)}
    heights = [sum(column) * 2**30 for column in zip(*(trace["y"] for trace in stacked), strict=True)]
    assert heights == pytest.approx(memory_event()["total_bytes"])
    assert found.trace("memory-in-step", "predicted peak")["x"] == [0.0, 0.3]
    for text in ("Step 2 (96 tokens)", "at the fullest moment (backward, layers.0)", "never take more than 4.00 KiB"):
        assert text in found.text, text
    measured = {trace["name"]: trace["x"][1] * 2**30 for trace in found.charts["memory-by-kind"]["traces"]}
    assert measured["weights"] == 2**20 and measured["more in other steps, or while loading"] > 2**28


def test_memory_inside_of_steps_of_two_runs(short_plotly):
    found = page_of(history([config_event(), memory_event()], "a"), history([config_event(), memory_event()], "b"))
    assert {"memory-in-step-0", "memory-in-step-1"} <= set(found.charts)
    assert "Memory inside of a step, b" in found.text


def test_without_a_prediction_the_step_is_shown_alone(short_plotly):
    found = page_of(history([config_event(predicted_memory=None), train_event(2), memory_event()]))
    assert "memory-by-kind" not in found.charts
    assert "predicted peak" not in [trace["name"] for trace in found.charts["memory-in-step"]["traces"]]


def test_samples_before_and_after(short_plotly):
    events = [config_event(), samples_event(0, "bzzz", ""), train_event(1), samples_event(1, "aa", "bb")]
    found = page_of(history(events))
    assert found.all("article") == [{"class": "sample"}] * 2
    text = found.text
    places = [
        text.index(part, text.index("say a:")) for part in ("bzzz", "after step 1", "aa", "in the data", "say a:1")
    ]
    assert places == sorted(places) and "nothing" in text[places[-1] :]
    assert not page_of(history(whole_run())).all("article")


def test_samples_of_two_runs_stand_beside_each_other(short_plotly):
    runs = [
        history([config_event(), samples_event(0, "same"), samples_event(3, name)], name) for name in ("one", "two")
    ]
    found = page_of(*runs)
    assert len(found.all("article")) == 1 and found.text.count("in the data") == 1
    assert "before the first step, one" in found.text and "after step 3, two" in found.text


def test_long_samples_are_cut(short_plotly):
    events = [config_event(), samples_event(0, "y" * 5000, prompt="<s>" + "x" * 5000)]
    text = page_of(history(events)).text
    assert text.count("x") < 700 and text.count("y") < 1200 and "…" in text


def test_an_old_run_has_no_memory_by_kind_and_says_so(short_plotly):
    events = whole_run()
    for name in ("predicted_memory", "program_bytes", "versions", "clip_grad_norm"):
        del events[0][name]
    for event in events:
        event.pop("peak_memory_bytes", None)
    found = page_of(history(events))
    assert "memory-by-kind" not in found.charts and "memory" in found.charts
    assert "an older version recorded none" in found.text


def test_what_is_hostile_stays_text(short_plotly):
    events = [
        config_event(versions={HOSTILE: HOSTILE}, device=HOSTILE, predicted_memory={HOSTILE: 5}),
        train_event(1),
        {"event": "checkpoint", "step": 1, "time": 1.0, "error": HOSTILE},
        {"event": "resume", "step": HOSTILE, "time": 1.0},
        samples_event(0, HOSTILE, prompt=HOSTILE, expected=HOSTILE),
        memory_event(
            where=[HOSTILE] * 4, bytes={HOSTILE: [1] * 4, "gradients": [2] * 4}, most_bytes={HOSTILE: HOSTILE}
        ),
    ]
    found = page_of(
        history(events, HOSTILE, {HOSTILE: HOSTILE, "model": HOSTILE}),
        history(events, HOSTILE + "2", {"model": [HOSTILE]}),
    )
    assert len(found.scripts) == 2 and found.all("img") == []
    assert HOSTILE in found.text
    texts = [trace["name"] for chart in found.charts.values() for trace in chart["traces"]]
    texts += [name for trace in found.charts["memory-by-kind"]["traces"] for name in trace["y"]]
    texts += [name for trace in found.charts["memory-in-step-0"]["traces"] for name in trace.get("text", [])]
    assert not [text for text in texts if "<" in text]  # plotly takes tags in them


def test_skipped_steps_are_marked(short_plotly):
    events = [
        config_event(),
        train_event(1),
        train_event(2, loss=None, grad_norm=None, skipped=True),
        train_event(3, spike=True, skipped=True),
    ]
    found = page_of(history(events))
    assert found.trace("loss", "skipped")["x"] == [2, 3]
    assert found.trace("loss", "skipped")["text"] == ["not finite", "loss spike"]
    assert found.trace("loss", "training, each step")["y"] == [3.0, None, 1.0]
    assert "2 steps updated nothing" in found.text and "no end yet" in found.text


def test_every_loss_null(short_plotly):
    events = [config_event(), *(train_event(step, loss=None, grad_norm=None, skipped=True) for step in (1, 2))]
    assert page_of(history(events)).trace("loss", "skipped")["x"] == [1, 2]


@pytest.mark.parametrize(
    "events", [[], [config_event()], [config_event(), eval_event(0)], [train_event(1)], [end_event(0)]]
)
def test_hardly_anything(events, short_plotly):
    assert "run" in page_of(history(events)).text


def test_one_evaluation_is_no_change(short_plotly):
    assert "Held-out loss 2." in page_of(history([config_event(), eval_event(0)])).text


def test_a_resumed_and_an_interrupted_run(short_plotly):
    events = [
        config_event(), train_event(1), config_event(1),
        {"event": "resume", "step": 1, "time": 1.0, "checkpoint": "c", "num_batches": 1}, train_event(2), end_event(2, interrupted=True),
    ]  # fmt: skip
    text = page_of(history(events)).text
    assert "resumed once, after step 1" in text and "interrupted after step 2" in text


def test_accuracy_of_a_task(short_plotly):
    events = [config_event(), eval_event(0, accuracy_sum=0.5, accuracy_per_token=0.25), train_event(1)]
    events.append(eval_event(1, accuracy_sum=0.75, accuracy_per_token=0.5))
    found = page_of(history(events))
    assert found.trace("accuracy", "summed scores")["y"] == [0.5, 0.75]
    assert "50.0% → 75.0%" in found.text


def test_settings_other_than_the_default_come_first(short_plotly):
    text = page_of(history(whole_run())).text
    changed, same = text.index("Different from the default"), text.index("All others")
    assert changed < text.index("optimizer", changed) < same < text.index("clip", same)


def test_two_runs_lie_over_each_other(short_plotly):
    found = page_of(history(whole_run(), "a"), history(whole_run(4), "b", {**SETTINGS, "lr": 0.7}))
    assert len(found.trace("loss", "training, b")["x"]) == 4 and len(found.trace("loss", "training, a")["x"]) == 10
    differing = found.text.index("Different in the two runs")
    assert (
        differing
        < found.text.index("lr", differing)
        < found.text.index("0.7", differing)
        < found.text.index("Different from the default")
    )


def test_a_long_run_makes_no_large_page():
    events = [config_event(), *(train_event(step) for step in range(1, 20_001))]
    found = content([history(events)], DEFAULTS)
    assert max(len(trace["x"]) for chart in found["charts"] for trace in chart["traces"]) <= 1700


def test_a_live_page_may_ask_its_own_server_only(short_plotly):
    found = page_of(history(whole_run()), live=True)
    assert found.policy()["connect-src"] == "'self'" and found.loads() == []


def test_without_plotly_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lowtide\[report\]'"):
        plotly_script()
