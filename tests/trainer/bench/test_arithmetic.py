"""What follows from a benchmark's figures: prediction, bottleneck, comparison, projection. Pure functions, no clock."""

import dataclasses
import json
from pathlib import Path

import pytest

from trainer.__main__ import main
from trainer.bench.bottleneck import Suggestion, find_doubt, judge
from trainer.bench.page import render
from trainer.bench.prediction import Links, costs_of, links_of, predict_rate, project, stall_share, without
from trainer.bench.record import (
    FORMAT,
    BenchRecord,
    Ceiling,
    Figure,
    Span,
    Stage,
    Throughput,
    Workload,
    differ,
    from_dict,
    read_record,
    to_json,
)
from trainer.bench.run import count_work
from trainer.bench.text import (
    advice_sentence,
    compare,
    comparison_sentence,
    differing_settings,
    node_rows,
    tried_sentence,
)
from trainer.config import ModelConfig
from trainer.errors import BenchError

BATCH = 100


def figure(median: float, spread: float = 0.02, n: int = 5) -> Figure:
    return Figure(median, median * (1 - spread / 2), median * (1 + spread / 2), n)


def stage(name: str, group: str, ms: float, cpu_ms: float | None = None) -> Stage:
    return Stage(name, group, figure(ms), 1e3 * BATCH / ms if ms else 0.0, cpu_ms)


def throughput(ms: float, cpu_ms: float) -> Throughput:
    return Throughput(figure(ms), cpu_ms, 1e3 * BATCH / ms)


def a_record(
    *, loader: tuple[float, float, float] = (1.0, 6.0, 3.0), net: dict[str, float] | None = None, **workload: object
) -> BenchRecord:
    """Read, decode, augment of ``loader`` ms with 2, 2 and 1 cores busy; a net with its stages on one core."""
    net = net or {"forward": 2.0, "backward": 4.0, "optimizer": 1.0}
    default = Workload(
        recipe="a.toml", data="data", images="", encoding="jpeg", processes=1, device="cpu", batch_size=BATCH,
        precision="fp32", cores=16, threads=16, decode="replicated", rounds=5, seconds=5.0, crossing_bytes=10_000_000,
        parameters=1_000_000, raw_bytes=30_000.0, sample_bytes=10_000.0, cached=1.0,
    )  # fmt: skip
    busy = (1.0, 2.0, 1.0)
    names = ("read", "decode", "augment")
    rows = [stage(name, "loader", ms, ms * b) for name, ms, b in zip(names, loader, busy, strict=True)]
    loader_cpu = sum(ms * b for ms, b in zip(loader, busy, strict=True))
    net_ms = sum(net.values())
    costs = max(sum(loader), net_ms)
    return BenchRecord(
        environment={"processor": "A"},
        workload=dataclasses.replace(default, **workload),  # type: ignore[arg-type]
        ceilings=(
            Ceiling("disk read", figure(100.0), "MB/s", ""),
            Ceiling("cached read", figure(1000.0), "MB/s", ""),
            Ceiling("matrix fp32", figure(100.0), "GFLOP/s", ""),
            Ceiling("matrix bf16", figure(200.0), "GFLOP/s", ""),
        ),
        stages=(*rows, *(stage(name, "net", ms) for name, ms in net.items())),
        loader=throughput(sum(loader), loader_cpu),
        synthetic=throughput(net_ms, net_ms),
        end_to_end=throughput(costs, loader_cpu + net_ms),
    )


def test_figures_are_medians_and_quartiles():
    assert Figure.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Figure(3.0, 2.0, 4.0, 5)
    assert Figure.of([7.0]) == Figure(7.0, 7.0, 7.0, 1)
    assert Figure.of([1.0, 2.0, 3.0]).noise == pytest.approx(1.57 / 3**0.5)


def test_the_prediction_is_the_longest_of_loader_net_and_processor_time():
    record = a_record()
    assert predict_rate(record) == pytest.approx(1e3 * BATCH / 10.0)  # the loader: 1 + 6 + 3 ms
    slow_net = a_record(net={"forward": 20.0, "backward": 40.0})
    assert predict_rate(slow_net) == pytest.approx(1e3 * BATCH / 60.0)
    few_cores = a_record(cores=2)  # 16 ms of the loader's and 7 ms of the net's processor time on 2 cores
    assert predict_rate(few_cores) == pytest.approx(1e3 * BATCH / 11.5)
    assert [costs_of(r).limit for r in (record, slow_net, few_cores)] == ["data", "net", "processor"]


def test_a_net_without_a_loader_is_its_own_limit():
    """On all cores its time and its processor time are one; a little more of the second is no other limit."""
    alone = dataclasses.replace(a_record(cores=1), loader=None, end_to_end=None, synthetic=throughput(7.0, 7.1))
    net = tuple(stage for stage in alone.stages if stage.group == "net")
    assert judge(dataclasses.replace(alone, stages=net)).side == "net"


@pytest.mark.parametrize(
    ("net", "loader", "cores", "share"),
    [
        (2, 2, 2, (1 + 1 / 2) / 2),  # one or two at once stop both of the net's threads
        (2, 1, 2, 1.0),  # one loader thread stops both
        (2, 2, 4, 0.0),  # a core for everybody
        (4, 2, 4, (1 + 1 / 2) / 2),
        (2, 2, 3, 1 / 2),  # one of the two finds a free core, the other stops the net
        (1, 2, 2, 0.0),  # a single thread waits for nobody
        (2, 8, 2, (1 + 1 / 2) / 2 * 2 / 8),  # two at most are in the net's way at a time
    ],
)
def test_a_net_in_step_stands_still_for_loader_threads_that_have_no_core_of_their_own(net, loader, cores, share):
    assert stall_share(net, loader, cores) == pytest.approx(share)


def test_standing_still_is_predicted_and_fewer_threads_are_suggested_where_they_pay():
    crowded = a_record(cores=2, threads=2, net_threads=2)  # net 7 ms, loader 10 ms and 16 ms of processor time
    assert predict_rate(crowded) == pytest.approx(1e3 * BATCH / (7.0 + 0.75 * 16.0))
    assert costs_of(crowded).limit == "processor"
    record = dataclasses.replace(crowded, by_threads={1: throughput(12.0, 12.0)})
    assert costs_of(record, record.by_threads[1], 1).step_ms == pytest.approx((16.0 + 12.0) / 2)
    (found,) = [s for s in judge(record).suggestions if s.change == "train.threads = 1"]
    assert found.images_per_s == pytest.approx(1e3 * BATCH / 14.0)
    assert found.factor == pytest.approx(19.0 / 14.0)
    slow = dataclasses.replace(crowded, by_threads={1: throughput(40.0, 40.0)})
    assert not [s for s in judge(slow).suggestions if s.change.startswith("train.threads")]
    assert from_dict(json.loads(to_json(record))) == record


def test_without_a_stage_its_time_and_its_processor_time_are_gone():
    record = a_record()
    costs = without(record, ("decode",))
    assert (costs.loader_ms, costs.loader_cpu_ms) == (pytest.approx(4.0), pytest.approx(4.0))
    costs = without(record, ("backward",), 0.5)
    assert (costs.net_ms, costs.net_cpu_ms) == (pytest.approx(5.0), pytest.approx(5.0))
    assert without(record, ("fc9",)) == costs_of(record)


@pytest.mark.parametrize(
    ("record", "side", "limit"),
    [
        (a_record(loader=(30.0, 6.0, 3.0)), "data", "read"),
        (a_record(loader=(1.0, 30.0, 3.0)), "data", "decode"),
        (a_record(loader=(1.0, 3.0, 30.0)), "data", "augment"),
        (a_record(net={"forward": 20.0, "exchange": 25.0, "backward": 30.0}), "net", "computation"),
        (a_record(net={"forward": 20.0, "exchange": 60.0, "backward": 30.0}), "net", "exchange"),
        (a_record(net={"forward": 2.0, "backward": 3.0, "optimizer": 20.0}), "net", "optimizer"),
        (a_record(cores=2), "processor", "decode"),
    ],
)
def test_the_bottleneck_names_the_limit(record, side, limit):
    found = judge(record)
    assert (found.side, found.limit) == (side, limit)
    assert found.sentence.startswith("The limit is ")


def test_the_bottleneck_says_by_how_much():
    found = judge(a_record(loader=(1.0, 30.0, 3.0)))
    assert "88% of the loader's time" in found.sentence  # 30 of 34 ms
    assert "4.86 times" in found.sentence  # then the net's 7 ms are the longest
    assert "2,941 images/s and the net takes 14,286" in found.sentence


def test_shares_and_gains_agree_where_stages_and_steps_do_not_add_up():
    """Stages are medians over steps, the whole is one over slots: on a restless machine they differ by much."""
    record = a_record(net={"forward": 20.0, "backward": 70.0, "optimizer": 10.0})
    restless = dataclasses.replace(record, synthetic=throughput(250.0, 250.0))
    found = judge(restless)
    assert "90% of the step" in found.sentence and "10.00 times as fast" in found.sentence


def test_the_projection_to_what_was_measured_is_the_prediction():
    for record in (a_record(), a_record(cores=2, threads=2, net_threads=2), a_record(net={"forward": 50.0})):
        assert project(record, 1, links_of(record)).images_per_s == pytest.approx(predict_rate(record))
    assert "all processes share this machine" in links_of(record).basis
    assert "50 GB/s (given), 100 us per message (assumed)" in links_of(record, tower_gb_per_s=50.0).basis


def test_suggestions_promise_what_the_model_gives_and_only_what_is_worth_it():
    found = {s.change.split(" ")[0]: s for s in judge(a_record(loader=(1.0, 30.0, 3.0), threads=4)).suggestions}
    assert found["data.threads"].factor == pytest.approx(34 / 11.5)  # 16 threads instead of 4
    assert found["raw"].factor == pytest.approx(34 / 7)  # no decoding, three times the reading: 6 ms, less than the net
    assert "3.0 times the bytes" in found["raw"].basis
    assert "train.precision" not in found  # the net is not the limit


def test_a_precision_is_suggested_where_it_was_measured_to_be_faster_and_only_there():
    """Matrices are twice as fast in bf16 on this machine; what the step makes of it, only the step tells."""
    record = a_record(net={"forward": 20.0, "backward": 40.0})
    assert judge(record).suggestions == ()
    faster = dataclasses.replace(record, by_precision={"bf16": throughput(40.0, 40.0)})
    (found,) = judge(faster).suggestions
    assert (found.change, found.factor) == ("train.precision = 'bf16'", pytest.approx(1.5))
    assert "--set train.precision='bf16':" in advice_sentence(faster, judge(faster))
    slower = dataclasses.replace(record, by_precision={"bf16": throughput(80.0, 80.0)})
    assert judge(slower).suggestions == ()
    assert "train.precision = 'bf16' 1,250 images/s." in tried_sentence(slower)  # a reader sees why it is not advised
    assert "1,250 images/s." in render(slower, judge(slower), []) and tried_sentence(record) == ""
    assert from_dict(json.loads(to_json(slower))) == slower


def test_a_measured_batch_size_is_suggested_as_measured():
    record = a_record(net={"forward": 20.0, "backward": 20.0, "optimizer": 15.0})
    assert "twice the batch size" in judge(record).suggestions[0].change
    record = dataclasses.replace(record, sweep={50: figure(900.0), 200: figure(3000.0)})
    (best,) = judge(record).suggestions
    assert (best.change, best.basis) == ("train.batch_size = 200", "measured")
    assert best.factor == pytest.approx(1.65)
    slower = dataclasses.replace(record, sweep={200: figure(1500.0)})
    assert judge(slower).suggestions == ()


def test_one_process_is_not_suggested_where_it_was_measured_to_be_slower():
    record = a_record(processes=2, net={"forward": 10.0, "exchange": 40.0, "waiting": 20.0, "backward": 10.0})
    alone = "--processes 1: both towers in one process"
    assert alone in [row.change for row in judge(record).suggestions]
    measured = dataclasses.replace(record, scaling={1: figure(900.0), 2: figure(1250.0)})
    assert alone not in [row.change for row in judge(measured).suggestions]
    faster = dataclasses.replace(record, scaling={1: figure(1800.0), 2: figure(1200.0)})
    (found,) = [row for row in judge(faster).suggestions if row.change == alone]
    assert found.factor == pytest.approx(1.5, rel=0.01) and "1,800 images/s instead of 1,200" in found.basis


def test_a_number_of_processes_that_was_measured_to_be_faster_is_suggested():
    """Else the page would say that nothing helps beside a chart that shows what does."""
    record = a_record(net={"forward": 20.0, "backward": 40.0})
    assert judge(record).suggestions == ()
    measured = dataclasses.replace(record, scaling={1: figure(1000.0), 2: figure(1400.0), 4: figure(9000.0)})
    (found,) = judge(measured).suggestions
    assert found.change.startswith("--processes 2") and found.factor == pytest.approx(1.4)
    slower = dataclasses.replace(record, scaling={1: figure(1000.0), 2: figure(700.0)})
    assert judge(slower).suggestions == () and "a GPU" in judge(slower).otherwise


@pytest.mark.parametrize("spread", [0.02, 0.9])
def test_what_a_comparison_would_call_no_difference_is_no_suggestion(spread):
    """A tenth faster counts where the rounds agree, and not where they are as far apart as that."""
    record = a_record(net={"forward": 20.0, "backward": 40.0})
    tenth = Throughput(figure(54.0, spread), 54.0, 1e3 * BATCH / 54.0)
    rates = figure(1e3 * BATCH / 54.0, spread)
    for changes in ({"by_precision": {"bf16": tenth}}, {"sweep": {200: rates}}):
        found = judge(dataclasses.replace(record, **changes)).suggestions
        assert [round(row.factor, 2) for row in found] == ([1.11] if spread < 0.1 else [])
    scaling = {1: figure(1000.0, spread), 2: figure(1111.0, spread)}
    assert len(judge(dataclasses.replace(record, scaling=scaling)).suggestions) == (spread < 0.1)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (a_record(net={"forward": 20.0, "backward": 40.0}), "a GPU, more cores, or a smaller net"),
        (a_record(net={"forward": 20.0, "backward": 40.0}, device="cuda:0", processes=2), "more GPUs"),
        (a_record(loader=(1.0, 2.0, 30.0)), "more processor cores for the loader"),
    ],
)
def test_where_nothing_helps_it_says_what_would(record, words):
    found = judge(record)
    assert found.suggestions == () and words in found.otherwise
    assert words in advice_sentence(record, found)


def test_a_result_that_contradicts_itself_gives_no_advice():
    record = a_record(loader=(1.0, 30.0, 3.0), threads=4)
    assert judge(record).suggestions
    twice = dataclasses.replace(record.synthetic, images_per_s=1e5)
    found = judge(dataclasses.replace(record, end_to_end=twice))
    assert found.suggestions == () and "contradict each other" in found.doubt and "No advice" in found.otherwise


def test_a_comparison_is_told_in_words():
    same, other = a_record(), a_record(loader=(1.0, 12.0, 3.0))
    sentence = "end to end: a is 1.60 times as fast; synthetic training: no difference; loader alone: a is 1.60 times"
    assert comparison_sentence(same, other).startswith(sentence)


def test_nothing_is_called_different_inside_the_noise():
    assert not differ(figure(100.0, 0.10), figure(104.0, 0.10))  # inside the notches
    assert differ(figure(100.0, 0.01), figure(104.0, 0.01))
    assert not differ(figure(100.0, 0.001), figure(102.0, 0.001))  # clear, but machines drift by that much
    same, other = a_record(), a_record(loader=(1.0, 12.0, 3.0))
    assert {row.better for row in compare(same, same)} == {"none"}
    rows = {row.name: row for row in compare(same, other)}
    assert (rows["decode"].better, rows["decode"].factor) == ("a", pytest.approx(2.0))
    assert rows["read"].better == "none"
    assert differing_settings(same, a_record(cores=4)) == [("cores", "16", "4")]


def test_what_was_measured_once_has_no_outcome():
    """One measurement has no spread, so any difference of it would look certain."""
    a = a_record()
    once = tuple(dataclasses.replace(c, figure=dataclasses.replace(c.figure.scaled(2.0), n=1)) for c in a.ceilings)
    rows = {row.name: row for row in compare(a, dataclasses.replace(a, ceilings=once))}
    assert rows["disk read"].words() == "measured once: no outcome"


def test_more_is_better_for_ceilings_and_batches_of_other_sizes_are_comparable():
    a, b = a_record(), a_record()
    faster = tuple(dataclasses.replace(c, figure=c.figure.scaled(2.0)) for c in b.ceilings)
    rows = {row.name: row for row in compare(a, dataclasses.replace(b, ceilings=faster))}
    assert (rows["disk read"].better, rows["disk read"].factor) == ("b", pytest.approx(2.0))
    halved = dataclasses.replace(b, workload=dataclasses.replace(b.workload, batch_size=BATCH // 2))
    rows = {row.name: row for row in compare(a, halved)}
    assert (rows["forward"].better, rows["forward"].factor) == ("a", pytest.approx(2.0))


def test_a_projection_is_the_model_of_describe_scale_with_the_measured_computation():
    links = Links(tower_gb_per_s=10.0, replica_gb_per_s=1.0, latency_us=100.0, own_devices=True)
    record = a_record(loader=(0.1, 0.1, 0.1), net={"forward": 4.0, "backward": 8.0})
    one, two, eight = (project(record, n, links) for n in (1, 2, 8))
    assert one.images_per_s == pytest.approx(1e3 * BATCH / 12)
    assert two.crossing_ms == pytest.approx(5e6 / 10e9 * 1e3 + 0.7)  # half of 10 MB each way, 7 latencies
    assert (two.sum_ms, two.control_ms) == (0.0, pytest.approx(0.1))
    assert two.images_per_s == pytest.approx(1e3 * BATCH / (6 + two.crossing_ms + two.control_ms))
    assert eight.sum_ms == pytest.approx(2 * 3 / 4 * 2e6 / 1e9 * 1e3 + 0.6)  # a ring of 4, 2 MB of gradients a tower
    hidden = 6 + two.crossing_ms + eight.control_ms  # the sum takes less than the backward
    assert eight.images_per_s == pytest.approx(4e3 * BATCH / hidden)
    slow = project(record, 8, dataclasses.replace(links, replica_gb_per_s=0.1))
    assert slow.images_per_s == pytest.approx(4e3 * BATCH / (hidden + slow.sum_ms - 4))
    slow_loader = a_record(loader=(5.0, 10.0, 5.0), net={"forward": 4.0, "backward": 8.0})
    assert project(slow_loader, 2, links).images_per_s == pytest.approx(1e3 * BATCH / 20)


def test_processes_that_share_a_machine_gain_nothing_but_crossings():
    record = a_record(loader=(0.1, 0.1, 0.1), net={"forward": 4.0, "backward": 8.0})
    links = links_of(record)
    assert not links.own_devices and links_of(record, tower_gb_per_s=300.0).own_devices
    two = project(record, 2, links)
    messages_ms = two.crossing_ms + two.control_ms
    assert (two.compute_ms, two.images_per_s) == (pytest.approx(12.0), pytest.approx(1e5 / (12 + messages_ms)))


def test_the_work_of_the_paper_is_what_its_layers_count():
    both, half = (count_work(ModelConfig(), 1, processes) for processes in (1, 2))
    assert both.forward_flop == 2 * 724_406_816  # multiply-accumulates of figure 2, layer by layer
    assert both.backward_flop == 2 * both.forward_flop - 2 * 105_415_200
    assert half.forward_flop == pytest.approx(both.forward_flop / 2 + 4_096_000)  # fc8 is tower a's alone
    assert (both.parameters, half.parameters) == (60_965_224, 32_531_112)


def test_a_record_survives_its_file_and_damage_is_one_line(tmp_path: Path):
    record, path = a_record(), tmp_path / "bench.json"
    path.write_text(to_json(record, bottleneck={"limit": "decode"}))
    assert read_record(path) == record == from_dict(json.loads(path.read_text()))
    path.write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(BenchError, match="is damaged: it has no environment"):
        read_record(path)
    for damage, words in ((None, "synthetic is null"), ({"ms": {"median": "fast"}}, "synthetic.ms.median is a str")):
        path.write_text(json.dumps(json.loads(to_json(record)) | {"synthetic": damage}))
        with pytest.raises(BenchError, match=f"is damaged: {words}"):
            read_record(path)
    path.write_text("[]")
    with pytest.raises(BenchError, match="is no result of python -m trainer bench"):
        read_record(path)
    with pytest.raises(BenchError, match="cannot be read"):
        read_record(tmp_path / "nothing.json")


def test_nodes_stand_side_by_side_the_slowest_first(tmp_path, monkeypatch, capsys):
    fast, slow = a_record(), a_record(loader=(1.0, 30.0, 3.0))
    fast, slow = (dataclasses.replace(r, environment={"host": name}) for r, name in ((fast, "one"), (slow, "two")))
    rows = node_rows([fast, slow])
    assert [(row.node, row.limit) for row in rows] == [("two", "decode"), ("one", "decode")]
    assert [row.share for row in rows] == [pytest.approx(10 / 34), 1.0]
    for name, record in (("a", fast), ("b", slow)):
        (tmp_path / f"{name}.json").write_text(to_json(record))
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    monkeypatch.setattr("sys.argv", ["trainer", "bench", "--read", *files, "--json", str(tmp_path / "all.json")])
    assert main() == 0
    assert "at the pace of two: 29% of the fastest" in capsys.readouterr().out
    assert [row["node"] for row in json.loads((tmp_path / "all.json").read_text())["nodes"]] == ["two", "one"]


def test_what_the_loader_does_in_the_training_thread_is_added_to_the_step():
    record = a_record(loader=(1.0, 6.0, 3.0), net={"forward": 2.0, "backward": 4.0})
    assert record.loader is not None
    record = dataclasses.replace(record, loader=dataclasses.replace(record.loader, own_ms=8.0))
    assert predict_rate(record) == pytest.approx(1e3 * BATCH / 14.0)
    found = judge(record)
    assert (found.side, found.limit) == ("net", "handover") and "1.40 times" in found.sentence


def test_a_result_that_cannot_be_is_doubted():
    valid = a_record()
    assert find_doubt(valid) == ""
    slower = min(valid.loader.images_per_s, valid.synthetic.images_per_s)
    impossible = dataclasses.replace(valid, end_to_end=dataclasses.replace(valid.synthetic, images_per_s=2 * slower))
    assert "2.00 times as fast as the slower" in find_doubt(impossible)
    restless = dataclasses.replace(valid.synthetic, ms=Figure(10.0, 6.0, 14.0, 5))
    assert "synthetic training took 6–14 ms" in find_doubt(dataclasses.replace(valid, synthetic=restless))


def test_the_page_escapes_every_text():
    """A result may come from another machine's file."""
    evil = "<evil a='\">"
    texts = dict.fromkeys(("recipe", "data", "images", "device", "precision"), evil)
    record = a_record(**texts, processes=2)
    stages = [dataclasses.replace(row, ceiling=evil, ceiling_ms=1.0, note=evil) for row in record.stages]
    record = dataclasses.replace(
        record,
        environment=dict.fromkeys(("started", "command", "commit", "host", "processor", "python", "torch"), evil)
        | {"gpus": [evil]},
        ceilings=tuple(dataclasses.replace(row, name=evil, unit=evil, note=evil) for row in record.ceilings),
        stages=(*stages, dataclasses.replace(stages[0], name=evil), dataclasses.replace(stages[-1], name=evil)),
        timeline=(Span(evil, evil, 0.0, 5.0), Span("b", f"{evil} forward", 1.0, 2.0)),
        sweep={200: figure(900.0)},
    )
    found = judge(a_record())
    suggestions = (Suggestion(evil, 1.0, 2.0, evil),)
    found = dataclasses.replace(found, sentence=evil, suggestions=suggestions)
    projections = [dataclasses.replace(project(a_record(), n, links_of(a_record())), basis=evil) for n in (1, 2)]
    text = render(record, found, projections)
    assert "<evil" not in text and text.count("&lt;evil") > 30
