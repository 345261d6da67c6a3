"""Tables, crossovers, steps, fits and pictures of `rwkv-npu bench matmul`."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rwkv_npu.bench import analysis, plot_matmul, report
from rwkv_npu.bench.document import Document, ProductRow
from rwkv_npu.errors import UsageError
from tests.bench_rows import estimate, published, square

# --- tables, crossovers, steps


def test_estimates_are_marked_everywhere() -> None:
    document = Document(ProductRow, {"cpu": "x"}, "rwkv-npu bench matmul", [square(64), estimate(64)])
    table = report.product_table(document)
    assert "~ An estimate, not a measurement" in table and "- command: `rwkv-npu bench matmul`" in table
    measured, guessed = (
        table[table.index(f"### {name}") + 3 :].split("##")[0]
        for name in ("numpy fp32", "rknn fp16 (estimate)")
    )
    assert "~" not in measured and "10 to 90 %" in measured
    (line,) = [line for line in guessed.splitlines() if line.startswith("|64")]
    assert line.count("~") == 3 and "range" in guessed
    assert max(map(len, table.splitlines())) <= 80
    assert [row["estimated"] for row in json.loads(document.to_json())["results"]] == [False, True]
    parsed = list(csv.DictReader(io.StringIO(report.product_csv(document.results))))
    assert [row["estimated"] for row in parsed] == ["False", "True"]


def test_tilings() -> None:
    counts = {100: 1, 200: 1, 300: 2, 400: 1}
    rows = [estimate(n) for n in counts]
    rows = [replace(row, npu_ops=counts[row.n]) for row in rows]
    (line,) = analysis.tilings(rows)
    assert line.startswith("rknn fp16 (estimate)") and line.endswith(
        "1 at N = 100 to 200, 2 at N = 300, 1 at N = 400"
    )
    table = report.product_table(Document(ProductRow, {}, "", rows))
    assert line in " ".join(table.split()) and analysis.tilings(rows[:2]) == []


def test_rows_have_the_documented_fields() -> None:
    promised = "backend device dtype m k n time_s time_p10_s time_p90_s gflops gb_per_s"
    promised += " max_rel_error estimated threads versions"
    (row,) = json.loads(Document(ProductRow, {}, "", [square(8)]).to_json())["results"]
    assert set(promised.split()) <= row.keys()
    assert all(not isinstance(value, (list, dict)) for value in row.values())


def test_failures_are_in_the_table() -> None:
    rows = [square(8), replace(square(16), time_s=None, gflops=None, gb_per_s=None, failed="it broke")]
    table = report.product_table(Document(ProductRow, {}, "", rows))
    assert "- failed: numpy fp32 16x16x16: it broke" in table and "\n|16" not in table


def test_crossovers() -> None:
    sizes = (100, 200, 400, 800)
    rows = [square(n, 1e-6 * n) for n in sizes]
    rows += [square(n, 1e-6 * n**2 / 300, backend="ort") for n in sizes]  # equal at 300
    rows += [estimate(n, 1e-6 * n, "rk3588-cpu") for n in sizes]
    rows += [estimate(n, 1e-6 * 150) for n in sizes]
    found = {(one.winner, one.loser): one for one in analysis.crossovers(rows)}
    one = found["numpy fp32", "ort fp32"]
    assert one.size == pytest.approx(300) and one.time_s == pytest.approx(3e-4) and not one.estimated
    board = found["rknn fp16 (estimate)", "rk3588-cpu fp16 (estimate)"]
    assert board.size == pytest.approx(150) and board.estimated
    # A board is compared with itself, and this machine with itself.
    assert len(found) == 2 and len(analysis.crossovers(rows, one_machine=True)) > 2
    (line,) = analysis.describe_crossovers([one], [])
    assert line == "numpy fp32 is faster than ort fp32 from N = 300 on (0.3 ms)"
    assert analysis.describe_crossovers([], ["a", "b"]) == ["no crossovers among a, b"]


def test_the_last_change_of_the_lead_counts() -> None:
    rows = [square(n, 1.0) for n in (100, 200, 400, 800)]
    rows += [square(n, t, backend="ort") for n, t in ((100, 0.5), (200, 2.0), (400, 2.0), (800, 0.5))]
    (one,) = analysis.crossovers(rows)
    assert one.winner == "ort fp32" and 400 < one.size < 800


def test_crossovers_in_one_place_share_a_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    said: dict[str, str] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: said.update({path.stem[2:]: texts(self)}))
    rows = [square(n, 1e-6 * n) for n in (100, 200, 400)]
    rows += [square(n, 1e-6 * n**2 / 300, backend="ort") for n in (100, 200, 400)]
    rows += [square(n, 1e-6 * n**3 / 301**2, backend="torch") for n in (100, 200, 400)]
    plot_matmul.draw_matmul(Document(ProductRow, {}, "", rows), tmp_path / "a.png")
    marks = said["time"].splitlines()
    assert "1-3" in marks and "1" not in marks and sum(" passes " in line for line in marks) == 3


def test_steps_and_spikes() -> None:
    rng = np.random.default_rng(0)
    n = np.arange(128, 4097, 128)
    t = 1e-11 * n**3.0 * np.exp(0.005 * rng.standard_normal(len(n)))
    assert (
        analysis.find_steps([square(int(a), b, time_error_s=0.005 * b) for a, b in zip(n, t, strict=True)])
        == []
    )
    overhead = t + 2e-4 + 1e-9 * n**2.0  # a call, and moving the matrices: no steps
    assert (
        analysis.find_steps([square(int(a), b, time_error_s=0.0) for a, b in zip(n, overhead, strict=True)])
        == []
    )
    t[n >= 1024] *= 1.3
    t[n == 2048] *= 1.5
    step, spike = analysis.find_steps(
        [square(int(a), b, time_error_s=0.005 * b) for a, b in zip(n, t, strict=True)]
    )
    assert (step.kind, step.before, step.after) == ("step", 896, 1024) and step.factor == pytest.approx(
        1.3, abs=0.03
    )
    assert (spike.kind, spike.before) == ("spike", 2048) and spike.factor == pytest.approx(1.5, abs=0.05)
    assert "from N = 896 to 1024 the time grows 1.3" in analysis.describe_step(step)
    assert "N = 2048 takes 1.5" in analysis.describe_step(spike)


# --- fits

SIZES = np.arange(128, 4097, 128)


def rows_of(t: np.ndarray, error: float = 0.0, **fields: Any) -> list[ProductRow]:
    return [square(int(n), float(s), time_error_s=error * s, **fields) for n, s in zip(SIZES, t, strict=True)]


def test_the_fit_finds_a_power_law() -> None:
    rng = np.random.default_rng(1)
    t = (0.02 * (SIZES / 1024) ** 2.9 + 3e-5) * np.exp(0.02 * rng.standard_normal(len(SIZES)))
    found = {(one.model, one.weights): one for one in analysis.fit_all(rows_of(t))}
    power, exponential = found["power", "repeats"], found["exponential", "repeats"]
    for name, value in (("a", 0.02), ("b", 2.9), ("t0", 3e-5)):
        assert abs(power.parameters[name] - value) < 4 * power.errors[name]
    assert (
        power.valid
        and 0.4 < power.reduced < 1.8
        and power.ndf == 29
        and power.edm < 1e-3
        and power.calls > 10
    )
    assert exponential.ndf == 30 and exponential.reduced > 100 and exponential.aic > power.aic + 1000
    equal = found["power", "equal"]
    assert equal.aic < found["exponential", "equal"].aic and equal.parameters["b"] == pytest.approx(
        2.9, abs=0.3
    )


def test_the_fit_finds_the_article_in_its_own_curve() -> None:
    t = analysis.ARTICLE.time(SIZES.astype(float))
    noise = np.sqrt(analysis.ARTICLE.chi2 / analysis.ARTICLE.ndf) / 4  # all of it would make times negative
    t = t + noise * np.random.default_rng(2).standard_normal(len(t))
    n = SIZES.astype(float)
    one = analysis.fit("x", "exponential", "equal", n, t, np.ones_like(t))
    for name, value, error in (("c", -2.98728, 0.0811982), ("s", 0.000918918, 2.29814e-05)):
        assert abs(one.parameters[name] - value) < error
        assert 4 * one.errors[name] == pytest.approx(error, rel=0.4)  # as ROOT gave them
    assert 16 * one.chi2 == pytest.approx(analysis.ARTICLE.chi2, rel=0.5)


def test_errors_do_not_depend_on_the_unit() -> None:
    n = SIZES.astype(float)
    t = 0.01 * (n / 1024) ** 3 + 1e-4 * np.sin(n)
    seconds = analysis.fit("x", "power", "equal", n, t, np.ones_like(t))
    thousands = analysis.fit("x", "power", "equal", n, 1e3 * t, np.ones_like(t))
    assert thousands.chi2 == pytest.approx(1e6 * seconds.chi2, rel=1e-3)
    for name, factor in (("a", 1e3), ("b", 1.0)):
        assert thousands.parameters[name] == pytest.approx(factor * seconds.parameters[name], rel=1e-3)
        scaled = [one.errors[name] for one in (seconds, thousands)]
        assert scaled[1] == pytest.approx(factor * scaled[0], rel=1e-2)


def test_a_cubic_fits_as_the_article_does() -> None:
    n = np.arange(256, 4097, 128).astype(float)
    twin = analysis.cubic_twin(n)
    one = analysis.fit("x", "exponential", "equal", n, twin.a * n**3 + twin.t0, np.ones_like(n))
    assert one.parameters["c"] == pytest.approx(analysis.ARTICLE.constant, abs=1e-3)
    assert one.parameters["s"] == pytest.approx(analysis.ARTICLE.slope, rel=1e-3)
    assert one.chi2 == pytest.approx(twin.chi2, rel=1e-4) and twin.chi2 < analysis.ARTICLE.chi2
    assert one.errors["s"] == pytest.approx(twin.slope_error, rel=0.1)


def test_the_fit_log() -> None:
    rows = rows_of(1e-11 * SIZES.astype(float) ** 3 + 1e-5, 0.01)
    log = report.fit_log(analysis.fit_all(rows))
    for words in (
        "chi2 ",
        "NDf 29",
        "EDM",
        "calls",
        "AIC",
        "|numpy fp32|",
        "Constant -2.98728 +/- 0.0811982",
        "Slope 0.000918918",
        "No unit",
        "31 points",
        "Exponential or cubic",
    ):
        assert words in " ".join(log.split())
    assert "NOT CONVERGED" not in log


def test_few_points_are_not_fitted() -> None:
    assert analysis.fit_all([square(n) for n in (8, 16, 24, 32, 40)]) == []


# --- pictures


def many_rows() -> list[ProductRow]:
    sizes = SIZES.astype(float)
    rows = rows_of(2e-11 * sizes**3, 0.01) + rows_of(1e-12 * sizes**3.2, 0.01, backend="torch")
    rows += [estimate(int(n), 3e-4 + 1e-12 * n**3) for n in sizes]
    rows += [estimate(int(n), 5e-12 * n**3, "rk3588-cpu") for n in sizes]
    return [*rows, published(1024, 4.4e-3), published(4096, 0.788)]


DRAWN = ("time", "roofline", "bars", "fit")


def test_pictures(tmp_path: Path) -> None:
    rows = many_rows()
    facts = {"cpu": "A & B <C>", "cores": 2, "bandwidth_gb_per_s": 30.0, "peak_fp32_gflops": 90.0}
    document = Document(ProductRow, facts, "", rows)
    paths = plot_matmul.draw_matmul(document, tmp_path / "a.svg", analysis.fit_all(rows), bars=[500, 4000])
    assert [path.name for path in paths] == [f"a-{name}.svg" for name in DRAWN]
    assert "estimate" in paths[0].name or all(path.stat().st_size > 5000 for path in paths)
    again = [path.read_bytes() for path in paths]
    assert [
        p.read_bytes()
        for p in plot_matmul.draw_matmul(document, tmp_path / "a.svg", analysis.fit_all(rows), [500, 4000])
    ] == again


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_texts_in_the_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    said: dict[str, str] = {}
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: said.update({path.stem[2:]: texts(self)}))
    rows = many_rows()
    facts = {"cpu": "this one", "cores": 2, "bandwidth_gb_per_s": 30.0, "peak_fp32_gflops": 90.0}
    plot_matmul.draw_matmul(Document(ProductRow, facts, "", rows), tmp_path / "a.png", analysis.fit_all(rows))
    assert all("rknn fp16 (estimate)" in text for text in said.values())
    assert (
        "passes" in said["time"] and "crossovers (~ estimate)" in said["time"] and "this one" in said["time"]
    )
    assert "stars: published" in said["time"] and "rknn-matmul fp16 (published)" in said["bars"]
    assert "30 GB/s" in said["roofline"] and "an RK3588 core,\nestimated" in said["roofline"]
    assert "hatched: estimates for an RK3588" in said["bars"] and "N = 4096" in said["bars"]
    assert "the article's exponential" in said["fit"]


def test_pictures_of_shapes_that_are_not_square(tmp_path: Path) -> None:
    rows = [replace(square(64), m=m, k=64, n=n) for m in (1, 16) for n in (64, 256)]
    paths = plot_matmul.draw_matmul(Document(ProductRow, {}, "", rows), tmp_path / "a.png")
    assert [path.name for path in paths] == ["a-time.png", "a-roofline.png", "a-bars.png"]
    assert plot_matmul.draw_matmul(Document(ProductRow, {}), tmp_path / "b.png") == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.pdf", "must end in .png or .svg"),
        ("a", "must end in .png or .svg"),
        ("none/a.png", "cannot write there: No such file"),
        ("file/a.png", "cannot write there: Not a directory"),
        ("taken.png", "cannot write there: Is a directory"),
    ],
)
def test_pictures_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "taken-bars.png").mkdir()
    with pytest.raises(UsageError, match=message):
        plot_matmul.check_matmul(tmp_path / name)
