"""The paper's exhibits: the numbers behind the figures, and studies that stop and go on."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from PIL import Image

from model_export.checkpoints import Checkpoint, Description, save_weights
from model_export.cli import study as command
from model_export.commands.labelled_data import load
from model_export.retinanet.losses import FocalStar, Hinge, Ohem
from model_export.retinanet.model import ModelConfig, RetinaNet
from model_export.study import ablation, ablation_report, loss_curves, loss_distribution
from model_export.training.callbacks import METRICS
from model_export.training.trainer import LAST, train
from service.errors import DataError
from service.imaging.canvas import Buckets, Size

CONFIGS = sorted((Path(ablation.__file__).parent / "configs").glob("*.yaml"))
BASE: dict[str, Any] = {
    "model": {
        "backbone": "mobilenet_v2",
        "fpn_channels": 8,
        "head_width": 8,
        "head_depth": 0,
        "anchors": {"sizes": [[24], [36], [48], [96], [192]]},
    },
    "canvas": {"rule": "buckets", "sizes": [[64, 96], [96, 64]]},
    "epochs": 1,
    "batch_size": 2,
    "validate_every": 1,
    "precision": "32",
    "workers": 0,
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(command, [str(each) for each in arguments])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# --- curves --------------------------------------------------------------------------------------


def test_curves_hold_the_losses_and_the_gradients_of_the_paper(tmp_path: Path) -> None:
    answer = run("curves", "--output", tmp_path / "new")
    assert answer.exit_code == 0, answer.output
    assert "at p_t 0.9 gamma 2 makes the loss 100 times smaller" in answer.output
    rows = read_csv(tmp_path / "new" / "loss-curves.csv")
    [middle] = [row for row in rows if abs(float(row["p_t"]) - 0.9) < 5e-4]
    p = float(middle["p_t"])
    for gamma, name in ((0, "CE"), (0.5, "FL gamma 0.5"), (2, "FL gamma 2"), (5, "FL gamma 5")):
        loss = -((1 - p) ** gamma) * np.log(p)
        slope = (1 - p) ** gamma * (gamma * p * np.log(p) + p - 1)
        assert float(middle[f"loss of {name}"]) == pytest.approx(loss, rel=1e-4)
        assert float(middle[f"gradient of {name}"]) == pytest.approx(slope, rel=1e-4)
    x = np.log(p / (1 - p))
    star = np.log1p(np.exp(-(2 * x + 1))) / 2
    assert float(middle["loss of FL* gamma 2 beta 1"]) == pytest.approx(star, rel=1e-4)
    with Image.open(tmp_path / "new" / "loss-curves.png") as image:
        assert image.width > 1000


def test_gamma_0_is_called_what_it_is() -> None:
    names = [curve.name for curve in loss_curves.compute((0.0, 2.0), ()).curves]
    assert names == ["CE", "FL gamma 2"]


# --- distribution --------------------------------------------------------------------------------


def histogram(*logits: float) -> loss_distribution.Histogram:
    made = loss_distribution.Histogram()
    made.add(torch.tensor(logits))
    return made


def test_the_hardest_carry_their_share() -> None:
    """Nine examples at x_t 2, one at -2: under CE 0.1269 each and 2.1269."""
    found = loss_distribution.distribution(histogram(*[2.0] * 9, -2.0), 0.0)
    hard = 2.1269 / (2.1269 + 9 * 0.1269)
    assert found.hardest(0.1) == pytest.approx(hard, abs=2e-3)
    assert found.hardest(1.0) == pytest.approx(1)
    # Between the two examples the curve is straight.
    assert found.hardest(0.05) == pytest.approx(hard / 2, abs=2e-3)
    # At gamma 2 the easy ones weigh (1 - .8808)^2 = .0142, the hard one .7758.
    steep = loss_distribution.distribution(histogram(*[2.0] * 9, -2.0), 2.0)
    assert steep.hardest(0.1) == pytest.approx(1.6500 / (1.6500 + 9 * 0.0018), abs=2e-3)


@pytest.mark.parametrize("gamma", loss_distribution.GAMMAS)
def test_the_binned_distribution_is_the_sorted_one(gamma: float) -> None:
    logits = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 3 + 2
    found = loss_distribution.distribution(histogram(*logits.tolist()), gamma)
    x = logits.double().sort(descending=True).values
    loss = (1 - x.sigmoid()) ** gamma * -torch.nn.functional.logsigmoid(x)
    for share in (0.01, 0.2, 0.5):
        exact = (loss[-round(share * len(x)) :].sum() / loss.sum()).item()
        assert found.hardest(share) == pytest.approx(exact, abs=3e-3)


def test_logits_beyond_the_bins_are_counted_at_the_end() -> None:
    found = histogram(1e4, -1e4, 0.0)
    assert found.examples == 3
    assert found.counts[0] == found.counts[-1] == 1


def test_nothing_has_no_distribution() -> None:
    with pytest.raises(ValueError, match="no examples"):
        loss_distribution.distribution(loss_distribution.Histogram(), 0.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network: every logit is about that of the prior."""
    config = ModelConfig.model_validate(BASE["model"])
    torch.manual_seed(0)
    network = RetinaNet(config, classes=2)
    path = tmp_path_factory.mktemp("checkpoint") / "random.safetensors"
    description = Description(
        classes=("red", "green"),
        model=config,
        canvas=Buckets(sizes=(Size(64, 96), Size(96, 64))),
    )
    save_weights(Checkpoint(path, description, network.state_dict()), path, half=False)
    return path


def test_cdf_of_an_untrained_network_counts_every_anchor(
    checkpoint: Path, rectangles_data: Path, tmp_path: Path
) -> None:
    answer = run("cdf", checkpoint, "--data", rectangles_data, "--output", tmp_path)
    assert answer.exit_code == 0, answer.output
    rows = read_csv(tmp_path / "loss-distribution.csv")
    assert len(rows) == 1001
    # All examples are alike, so that half of them carry about half of the loss.
    for kind in ("foreground", "background"):
        assert float(rows[500][f"{kind}, gamma 0"]) == pytest.approx(0.5, abs=0.05)
    # 8 x 12 + 4 x 6 + 2 x 3 + 1 x 2 + 1 cells of 3 anchors and 2 classes, on 10 images; those
    # of foreground and of ignored anchors are not background.
    foreground, background = (
        int(answer.output.split(" foreground and ")[0].rsplit(" ", 1)[1]),
        int(answer.output.split(" foreground and ")[1].split(" ", 1)[0]),
    )
    assert foreground >= 9
    assert background <= 10 * 129 * 3 * 2 - foreground
    assert background > 0.9 * 10 * 129 * 3 * 2
    assert "hardest 1%" in answer.output
    with Image.open(tmp_path / "loss-distribution.png") as image:
        assert image.width > 1000


@pytest.mark.parametrize("device", ["tpu", "cuda", "cpu:x"])
def test_cdf_refuses_what_is_no_device(
    checkpoint: Path, rectangles_data: Path, tmp_path: Path, device: str
) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    answer = run(
        "cdf", checkpoint, "--data", rectangles_data, "--output", tmp_path, "--device", device
    )
    assert answer.exit_code != 0
    assert f"--device {device}" in str(answer.exception)


# --- ablation ------------------------------------------------------------------------------------


def write_study(path: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "seeds": [0],
        "base": BASE,
        "rows": [
            {"name": "star", "set": {"loss.classification": {"name": "focal_star"}}, "paper": 33.9},
            {"name": "hinge", "set": {"loss.classification": {"name": "hinge"}}},
        ],
    }
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_study_that_ships_is_valid(path: Path, tmp_path: Path) -> None:
    study = ablation.load_study(path)
    runs = ablation.plan(study, tmp_path, {})
    assert len(runs) == len(study.seeds) * len(ablation.expand(study.rows))
    assert len({run.folder for run in runs}) == len(runs)
    # Rows that train the same thing twice would be a mistake in the file.
    configs = {run.config.model_dump_json() for run in runs}
    assert len(configs) == len(runs)


def test_a_study_runs_once_and_goes_on_where_it_stopped(
    rectangles_data: Path, tmp_path: Path
) -> None:
    config, output = write_study(tmp_path / "study.yaml", seeds=[0, 1]), tmp_path / "out"
    arguments = ("ablate", "--config", config, "--data", rectangles_data, "--output", output)
    first = run(*arguments, "--row", "hinge")
    assert first.exit_code == 0, first.output
    assert not (output / "star").exists()
    assert "| hinge | 2 |" in first.output
    results = [output / "hinge" / f"seed-{seed}" / "result.json" for seed in (0, 1)]
    before = [path.stat().st_mtime_ns for path in results]
    assert not (output / "hinge" / "seed-0" / LAST).exists()

    second = run(*arguments)
    assert second.exit_code == 0, second.output
    assert second.output.count("(done before)") == 2
    assert [path.stat().st_mtime_ns for path in results] == before
    rows = read_csv(output / "ablation.csv")
    assert [(row["row"], row["seed"]) for row in rows] == [
        ("star", "0"),
        ("hinge", "0"),
        ("star", "1"),
        ("hinge", "1"),
    ]
    assert (output / "ablation.md").read_text().count("\n") == 4
    with Image.open(output / "ablation.png") as image:
        assert image.width > 600


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_result_is_not_trained_again(
    rectangles_data: Path, tmp_path: Path
) -> None:
    config, output = write_study(tmp_path / "study.yaml"), tmp_path / "out"
    [killed] = [
        run
        for run in ablation.plan(ablation.load_study(config), output, {})
        if run.row.name == "star"
    ]
    training = load(rectangles_data, "train")
    validation = load(rectangles_data, "val", classes=training.classes)
    train(killed.config, training, validation, killed.folder, device="cpu")
    run_inputs = ablation.run_inputs(killed, training, validation)
    (killed.folder / ablation.MADE_OF).write_text(json.dumps(run_inputs))
    before = (killed.folder / METRICS).read_text()
    answer = run(
        "ablate", "--config", config, "--data", rectangles_data, "--output", output,
        "--row", "star",
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert (killed.folder / METRICS).read_text() == before
    result = ablation.finished(killed)
    assert result is not None
    assert result.diverged is None


@pytest.mark.slow
def test_processes_of_a_killed_study_end_with_it(rectangles_data: Path, tmp_path: Path) -> None:
    base = BASE | {"epochs": 500, "validate_every": 500}
    config, output = write_study(tmp_path / "study.yaml", base=base), tmp_path / "out"
    command: list[str | Path] = [sys.executable, "-c", "from service.cli import main; main()"]
    command += ["study", "ablate", "--config", config, "--data", rectangles_data]
    command += ["--output", output, "--jobs", "2"]
    started = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while len(list(output.glob("*/*/last.ckpt"))) < 2:
            assert started.poll() is None
            time.sleep(0.2)
        processes = psutil.Process(started.pid).children(recursive=True)
    finally:
        started.kill()
        started.wait()
    assert len(processes) >= 2
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert not alive


@pytest.mark.slow
def test_a_run_that_diverges_is_a_row_of_the_table(rectangles_data: Path, tmp_path: Path) -> None:
    """A learning rate of 1e30 leaves nothing finite: the row says so, and the study goes on."""
    rows = [
        {"name": "wild", "set": {"optimiser.lr": 1e30, "optimiser.warmup_steps": 0, "epochs": 20}},
        {"name": "tame", "set": {}},
    ]
    base = BASE | {"optimiser": {"gradient_clip": 1e9}}
    config, output = write_study(tmp_path / "s.yaml", rows=rows, base=base), tmp_path / "out"
    answer = run(
        "ablate", "--config", config, "--data", rectangles_data, "--output", output, "--jobs", "2"
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    assert "| wild | 1, 1 diverged | - | - | - to - | - |" in answer.output
    assert "not finite" in answer.output
    assert "| tame | 1 |" in answer.output
    saved = json.loads((output / "wild" / "seed-0" / "result.json").read_text())
    assert saved["ap"] == 0
    assert "not finite" in saved["diverged"]


def test_settings_of_a_row_and_of_the_command_reach_the_run(tmp_path: Path) -> None:
    study = ablation.load_study(
        write_study(
            tmp_path / "s.yaml",
            seeds=[3, 4],
            rows=[
                {"name": "OHEM", "set": {"loss.classification": {"name": "ohem", "keep": 9}}},
                {
                    "name": "FL*",
                    "set": {"loss.classification.name": "focal_star"},
                    "grid": {
                        "loss.classification.gamma": [2, 4],
                        "loss.classification.beta": [0, 1],
                    },
                },
            ],
        )
    )
    runs = ablation.plan(study, tmp_path, {"epochs": 7, "optimiser.lr": 0.5})
    assert [run.row.name for run in runs[:5]] == [
        "OHEM",
        "FL*, gamma 2, beta 0",
        "FL*, gamma 2, beta 1",
        "FL*, gamma 4, beta 0",
        "FL*, gamma 4, beta 1",
    ]
    assert [run.config.seed for run in runs] == [3] * 5 + [4] * 5
    assert {run.config.epochs for run in runs} == {7}
    assert {run.config.optimiser.lr for run in runs} == {0.5}
    assert runs[0].config.loss.classification == Ohem(keep=9)
    assert runs[3].config.loss.classification == FocalStar(gamma=4, beta=0)
    assert runs[1].folder == tmp_path / "fl-gamma-2-beta-0" / "seed-3"
    assert Hinge() not in {run.config.loss.classification for run in runs}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rows": []}, "rows"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "rows repeat: a"),
        ({"rows": [{"name": "a b"}, {"name": "a-b"}]}, "differ in signs only"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1, 1]}, "seeds repeat"),
        ({"rows": [{"name": "a", "sets": {}}]}, "sets"),
        ({"pictures": 0}, "pictures"),
        ({"rows": [{"name": "a", "set": {"epochs": 0}}]}, "row 'a': epochs"),
        ({"rows": [{"name": "a", "set": {"loss.classification.name": "dice"}}]}, "row 'a'"),
        ({"base": {"epochs": 0}}, "epochs"),
        ({"rows": [{"name": "a", "grid": {"seed": [1, 2]}}]}, "seed"),
        ({"rows": [{"name": "a", "set": {"data.classes": ["red"]}}]}, "data.classes"),
        ({"rows": [{"name": "a", "grid": {"epochs": []}}]}, "grid.epochs"),
        ({"rows": [{"name": "a", "grid": {"epochs": [1, 2]}, "paper": 3}]}, "paper"),
        ({"rows": [{"name": "a|b"}]}, "name"),
        ({"rows": [{"name": ".."}]}, "name"),
        ({"base": {"seed": 3}}, "base.seed"),
        ({"rows": [{"name": "a", "reference": "CE"}]}, "reference 'CE' is no row; one of a"),
        ({"reference": "CE"}, "reference 'CE' is no row; one of star, hinge"),
        ({"pictures": 99}, "99 images"),
        ({"validation_pictures": 99}, "99 images"),
    ],
)
def test_a_study_that_cannot_run_is_refused_before_the_first_run(
    changes: dict[str, Any], reason: str, rectangles_data: Path, tmp_path: Path
) -> None:
    config, output = write_study(tmp_path / "study.yaml", **changes), tmp_path / "out"
    answer = run("ablate", "--config", config, "--data", rectangles_data, "--output", output)
    assert isinstance(answer.exception, DataError)
    assert reason in str(answer.exception)
    assert not output.exists()


def test_an_unknown_row_is_refused(rectangles_data: Path, tmp_path: Path) -> None:
    config = write_study(tmp_path / "study.yaml")
    answer = run(
        "ablate", "--config", config, "--data", rectangles_data, "--output", tmp_path / "o",
        "--row", "focal",
    )  # fmt: skip
    assert isinstance(answer.exception, DataError)
    assert "the rows are star, hinge" in str(answer.exception)


def test_a_setting_for_all_runs_must_not_make_two_rows_one(
    rectangles_data: Path, tmp_path: Path
) -> None:
    config = write_study(tmp_path / "study.yaml")
    for setting in ("loss.classification.name=ce", "loss={}", "seed=3"):
        answer = run(
            "ablate", "--config", config, "--data", rectangles_data, "--output", tmp_path / "o",
            "--set", setting,
        )  # fmt: skip
        assert isinstance(answer.exception, DataError)
        assert f"--set {setting.partition('=')[0]}" in str(answer.exception)


def test_a_result_that_is_none_is_refused(rectangles_data: Path, tmp_path: Path) -> None:
    config, output = write_study(tmp_path / "study.yaml"), tmp_path / "out"
    broken = output / "star" / "seed-0" / "result.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    study = ablation.load_study(config)
    training = load(rectangles_data, "train")
    validation = load(rectangles_data, "val", classes=training.classes)
    [first] = [each for each in ablation.plan(study, output, {}) if each.row.name == "star"]
    run_inputs = ablation.run_inputs(first, training, validation)
    (broken.parent / ablation.MADE_OF).write_text(json.dumps(run_inputs))
    answer = run("ablate", "--config", config, "--data", rectangles_data, "--output", output)
    assert isinstance(answer.exception, DataError)
    assert f"{broken}: not a result" in str(answer.exception)
    assert "delete it" in str(answer.exception)


def test_the_subset_depends_on_the_names_and_the_seed_alone(rectangles_data: Path) -> None:
    dataset = load(rectangles_data, "val")
    turned = dataclasses.replace(dataset, samples=dataset.samples[::-1])

    def names(seed: int, *, of: Any = dataset) -> set[str]:
        found = ablation.subset(of, 4, seed=seed)
        assert len(found.samples) == 4
        return {sample.path.name for sample in found.samples}

    assert names(0) == names(0, of=turned)
    assert len({frozenset(names(seed)) for seed in range(5)}) > 1
    assert ablation.subset(dataset, None, seed=0) is dataset


def test_merged_classes_are_one(rectangles_data: Path) -> None:
    dataset = load(rectangles_data, "val")
    merged = ablation.merge_classes(dataset, "rectangle")
    assert merged.classes == ("rectangle",)
    for before, after in zip(dataset.samples, merged.samples, strict=True):
        assert after.labels.tolist() == [0] * len(before.labels)
        assert after.boxes is before.boxes
    assert ablation.merge_classes(dataset, None) is dataset


def test_the_table_has_mean_and_spread_over_seeds() -> None:
    rows = [ablation.Row("a", {}, 34.0), ablation.Row("b", {}, None), ablation.Row("c", {}, None)]
    results = [
        ablation.Result("a", seed, ap, 2 * ap, 1.5, None)
        for seed, ap in enumerate((0.10, 0.20, 0.30))
    ] + [
        ablation.Result("a", 3, 0.0, 0.0, 0.1, "not finite"),
        ablation.Result("b", 0, 0.0, 0.0, 0.5, "not finite"),
    ]
    lines = list(ablation_report.table(ablation_report.summarise(rows, results)))
    assert lines[2:] == [
        "| a | 4, 1 diverged | 20.0 | 10.0 | 10.0 to 30.0 | 40.0 | 1.5 | 34.0 |",
        "| b | 1, 1 diverged | - | - | - to - | - | 0.5 | - |",
    ]


def test_differences_are_taken_seed_by_seed_from_the_reference() -> None:
    rows = [ablation.Row(name, {}, reference="a") for name in ("a", "b", "c")]
    rows.append(ablation.Row("d", {}, reference="b"))
    results = [
        ablation.Result(row, seed, ap, ap, 1.0, None)
        for row, aps in (
            ("a", (0.10, 0.20, 0.30)),
            ("b", (0.11, 0.22, 0.33)),
            ("d", (0.10, 0.21, 0.32)),
        )
        for seed, ap in enumerate(aps)
    ]
    results.append(ablation.Result("b", 3, 0.9, 0.9, 1.0, None))
    results.append(ablation.Result("c", 1, 0.0, 0.0, 1.0, "not finite"))
    summaries = ablation_report.summarise(rows, results)
    lines = list(ablation_report.table(summaries))
    # Differences of 1, 2 and 3: sd 1, times 4.303 / sqrt(3). Seed 3 has no partner.
    assert lines[0].startswith("| row | runs | AP | sd | min to max | difference |")
    assert [line.split(" | ")[5] for line in lines[2:]] == [
        "-",
        "+2.0 ± 2.5 to a",
        "-",
        "-1.0 ± 0.0 to b",
    ]
    assert summaries[1].difference is not None
    assert summaries[1].difference.seeds == 3


def test_a_changed_study_does_not_take_old_rows(rectangles_data: Path, tmp_path: Path) -> None:
    config, output = write_study(tmp_path / "study.yaml"), tmp_path / "out"
    arguments = ("ablate", "--config", config, "--data", rectangles_data, "--output", output)
    assert run(*arguments, "--row", "hinge").exit_code == 0
    changed = run(*arguments, "--row", "hinge", "--set", "optimiser.lr=0.5")
    assert isinstance(changed.exception, DataError)
    assert "holds a run with another config" in str(changed.exception)
    # A setting that is newer than the run has its default there.
    made_of = next(output.rglob(ablation.MADE_OF))
    content = json.loads(made_of.read_text())
    del content["config"]["augmentation"]["mosaic_until"]
    made_of.write_text(json.dumps(content))
    assert run(*arguments, "--row", "hinge").exit_code == 0
    newer = run(*arguments, "--row", "hinge", "--set", "augmentation.mosaic_until=0.5")
    assert "holds a run with another config" in str(newer.exception)
    fewer = write_study(tmp_path / "fewer.yaml", validation_pictures=3)
    other = run(
        "ablate", "--config", fewer, "--data", rectangles_data, "--output", output,
        "--row", "hinge",
    )  # fmt: skip
    assert isinstance(other.exception, DataError)
    assert "holds a run with another val" in str(other.exception)


@pytest.mark.slow
def test_cdf_reads_the_checkpoint_of_a_study_of_one_class(
    rectangles_data: Path, tmp_path: Path
) -> None:
    config = write_study(
        tmp_path / "study.yaml",
        merge_classes="rectangle",
        rows=[{"name": "strict", "set": {"matching": {"foreground": 0.7}}}],
    )
    output = tmp_path / "out"
    made = run("ablate", "--config", config, "--data", rectangles_data, "--output", output)
    assert made.exit_code == 0, made.output
    best = output / "strict" / "seed-0" / "best.ckpt"
    arguments = ("cdf", best, "--data", rectangles_data, "--output", tmp_path / "cdf")
    assert run(*arguments).exit_code != 0
    answer = run(*arguments, "--merge-classes")
    assert answer.exit_code == 0, answer.output
    assert "by the defaults" not in answer.output
    # Only what the strict run would have learned from: the claimed anchor of each of 9 objects.
    assert int(answer.output.split(" foreground and ")[0].rsplit(" ", 1)[1]) < 40
