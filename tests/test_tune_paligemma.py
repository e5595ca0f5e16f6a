"""Fine-tuning of PaliGemma: real training of small models of random weights, against Hugging Face's own loss."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import PaliGemmaForConditionalGeneration, PaliGemmaProcessor

from demo.questions import seen
from demo.scenes import scenes
from demo.writers import jpeg
from shardsight.decode.pictures import decode
from shardsight.errors import UsageError
from shardsight.models.paligemma.info import inspect
from tests import small_paligemma
from tests.ask_paligemma import Asked, ask
from tests.conftest import ROOT, WEIGHTS, free_port
from tune import paligemma
from tune.paligemma_data import Changes, Example, ordered
from tune.paligemma_training import HYPERPARAMETERS, Request, Trial, load, loss_of, memory
from tune.paligemma_workers import joined

torch.set_num_threads(1)  # of models this small, two threads wait for each other
ANSWERS = ["red", "two dogs", "a blue car in the picture", "<loc0010><loc0020><loc0500><loc1023> car"]
PROMPTS = ["caption en", "answer en what colour is the car?", "what is in the picture?", "detect car"]


@pytest.fixture(scope="module", params=["gemma", "gemma2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PaliGemma 1 and 2."""
    return small_paligemma.make(tmp_path_factory.mktemp(request.param), request.param, ends=False)


def write_set(folder: Path, count: int = 12, **more: Any) -> Path:
    """A labelled set of `count` pictures with a question each; more: instead of its fields, in the last line."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, frame in enumerate(small_paligemma.pictures(count)):
        Image.fromarray(frame).save(folder / f"{number}.png")
        which = number % len(PROMPTS)
        lines.append({"image": f"{number}.png", "prefix": PROMPTS[which], "suffix": ANSWERS[which]})
    lines[-1] |= more
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "train.jsonl"


def examples(path: Path) -> list[Example]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Example(str(path.parent / one["image"]), one["prefix"], (one["suffix"],)) for one in lines]


def request(model: Path, path: Path, epochs: int = 2, **more: Any) -> Request:
    found = examples(path)
    settings = {"batch": 4, "micro_batch": 4, "lr": 1e-4} | more.pop("settings", {})
    return Request(str(model), found, found[:2], epochs, 3, 20, settings, precision="fp32", **more)


class Noted(Trial):
    """Keeps the loss of each step."""

    losses: list[float]

    def step(self, batch: list[Any]) -> float:
        self.losses = [*getattr(self, "losses", []), super().step(batch)]
        return self.losses[-1]


def trained(run: Path, asked: Request, **config: Any) -> Noted:
    run.mkdir(parents=True, exist_ok=True)
    trial = Noted(run, asked, config, lambda values: None)
    trial.train()
    return trial


def reference(asked: Request, weights: str, steps: int) -> list[float]:
    """Hugging Face's model, its loss of the whole batch with its processor's labels, PyTorch's AdamW and a schedule."""
    processor = PaliGemmaProcessor.from_pretrained(asked.model)
    model: Any = PaliGemmaForConditionalGeneration.from_pretrained(
        asked.model, dtype=torch.float32, attn_implementation="eager" if "gemma2" in asked.model else "sdpa"
    )
    torch.manual_seed(asked.seed)
    if weights == "lora":
        targets = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
        model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets))
    elif weights == "decoder":
        model.model.vision_tower.requires_grad_(False)
    model.train()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0)
    size = asked.settings["batch"]
    batches = math.ceil(len(asked.train) / size)
    total = batches * asked.epochs
    warm = max(1, round(0.05 * total))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: (n + 1) / warm if n < warm else 0.5 * (1 + math.cos(math.pi * (n - warm) / (total - warm))),
    )
    losses: list[float] = []
    for step in range(steps):
        order = ordered(asked.train, asked.seed, step // batches)
        batch = order[step % batches * size :][:size]
        inputs = processor(
            images=[np.array(Image.open(one.image)) for one, *_ in batch],
            text=[f"<image>{one.prefix}" for one, *_ in batch],
            suffix=[answer for _, answer, _ in batch],
            return_tensors="pt",
            padding="longest",
        )
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(("weights", "part"), [("all", 4), ("all", 3), ("decoder", 3), ("lora", 3)])
def test_the_loss_is_hugging_faces(model: Path, tmp_path: Path, weights: str, part: int) -> None:
    """For 20 steps, also where a step is computed in parts: then as of the whole batch, each answer's token counting
    the same. Another mask, or another mean, would train another model than the one that is served."""
    asked = request(model, write_set(tmp_path / "data", 39), settings={"weights": weights, "micro_batch": part})
    losses = trained(tmp_path / "run", asked).losses
    assert len(losses) == 20
    np.testing.assert_allclose(losses, reference(asked, weights, 20), atol=1e-4, rtol=0)


def _train_as(rank: int, port: int, run: Path, asked: Request, losses: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=not rank, wait_for_workers=False)
    with joined(rank, 2, store) as group:
        run.mkdir(parents=True)
        reported: list[dict[str, Any]] = []
        trial = Noted(run, asked, {}, reported.append, group)
        trial.train()
    losses.write_text(json.dumps([trial.losses, reported]))


@pytest.mark.parametrize(
    ("weights", "count", "steps"),
    [("all", 5, 4), *(pytest.param(weights, 39, 20, marks=pytest.mark.slow) for weights in ("all", "lora"))],
)
def test_two_workers_have_the_loss_of_one(model: Path, tmp_path: Path, weights: str, count: int, steps: int) -> None:
    """Also where the last batch of an epoch has two pictures for the first and one for the second, or one and none. And
    both measure their share of the pictures that are measured on."""
    asked = request(model, write_set(tmp_path / "data", count), settings={"weights": weights, "micro_batch": 1})
    port, found = free_port(), []
    processes = [
        get_context("spawn").Process(
            target=_train_as, args=(rank, port, tmp_path / f"run {rank}", asked, tmp_path / f"{rank}.json")
        )
        for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for rank, process in enumerate(processes):
        process.join()
        assert process.exitcode == 0
        found.append(json.loads((tmp_path / f"{rank}.json").read_text()))
    (losses, reported), (others, silent) = found
    assert losses == others and len(losses) == steps and not silent
    np.testing.assert_allclose(losses, reference(asked, weights, steps), atol=1e-4, rtol=0)
    alone: list[dict[str, Any]] = []
    (tmp_path / "alone").mkdir()
    Trial(tmp_path / "alone", asked, {}, alone.append).train()
    for mine, theirs in zip(reported, alone, strict=True):
        assert mine["val/loss"] == pytest.approx(theirs["val/loss"], abs=1e-4)
        assert mine["fitness"] == theirs["fitness"]


def test_label_smoothing_is_big_visions(tmp_path: Path) -> None:
    """1 - s on the right token, s shared among the others; and only the answer's tokens count."""
    folder = small_paligemma.make(tmp_path / "model", ends=False)
    asked = request(folder, write_set(tmp_path / "data"))
    trial = Trial(tmp_path / "run", asked, {}, lambda values: None)
    trial.model.eval()
    inputs = trial.collator.train(ordered(asked.train, 0, 0)[:4])
    labels = inputs["labels"][:, 1:]
    with torch.inference_mode():
        given = {name: value for name, value in inputs.items() if name != "labels"}
        likely = trial.model(**given).logits[:, :-1].log_softmax(-1)[labels >= 0]
        found = float(loss_of(trial.model, inputs, 0.3))
    right = labels[labels >= 0]
    wanted = torch.full_like(likely, 0.3 / (likely.shape[-1] - 1)).scatter(1, right[:, None], 0.7)
    assert found == pytest.approx(float(-(wanted * likely).sum()), abs=1e-3)


def _train_and_die(run: Path, saved: Path, asked: Request, die: int) -> None:
    """Train; `saved` is the last checkpoint; die as by `kill -9` when `die` steps are done."""
    torch.set_num_threads(1)

    def save(values: dict[str, Any]) -> None:
        shutil.copytree(run, saved, dirs_exist_ok=True)

    class Dying(Trial):
        def step(self, batch: list[Any]) -> float:
            loss = super().step(batch)
            if self.done.step == die:
                os.kill(os.getpid(), signal.SIGKILL)
            return loss

    run.mkdir()
    Dying(run, asked, {}, save).train()


@pytest.mark.parametrize(("weights", "changes"), [("all", Changes(("flip", "crop"), 3)), ("lora", Changes())])
def test_a_killed_training_goes_on_to_the_step(tmp_path: Path, weights: str, changes: Changes) -> None:
    """Killed two steps after a checkpoint within its second epoch, with dropout: the same losses as never stopped, also
    where pictures and answers are changed in each epoch."""
    folder = small_paligemma.make(tmp_path / "model", ends=False)
    settings = {"weights": weights, "dropout": 0.1, "label_smoothing": 0.1, "micro_batch": 3, "lr": 1e-3}
    asked = request(folder, write_set(tmp_path / "data", 20), settings=settings, save_steps=2, changes=changes)
    whole = trained(tmp_path / "whole", asked).losses
    process = get_context("spawn").Process(target=_train_and_die, args=(tmp_path / "a", tmp_path / "b", asked, 9))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    rest = trained(tmp_path / "b", asked).losses
    assert len(whole) == 10 and len(rest) == 3  # saved at step 7, the second of its epoch
    np.testing.assert_allclose(rest, whole[7:], atol=1e-5, rtol=0)


def test_memory_is_known_before_a_model_is_loaded(tmp_path: Path) -> None:
    """From its config alone; a model that cannot fit is refused in one sentence."""
    folder = small_paligemma.make(tmp_path / "model", ends=False)
    info = inspect(str(folder))
    sizes = {
        weights: memory(info, HYPERPARAMETERS | {"weights": weights}, bf16=True)
        for weights in ("all", "decoder", "lora")
    }
    assert sizes["all"] == 16 * info.parameters > sizes["decoder"] > sizes["lora"] > 2 * info.parameters
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 65536, "intermediate_size": 262144}
    config |= {"hidden_size": 65536, "projection_dim": 65536}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match=r"takes at least [\d.]+ GiB to train with weights=all"):
        load(info, HYPERPARAMETERS, False, "cpu")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--model", "nowhere"], "there is no folder nowhere"),
        (["--train", "lr0=1"], "there is no hyperparameter lr0: did you mean lr?"),
        (["--merge"], "--merge folds a LoRA in"),
        (["--train", "weights=head"], "choose from all, decoder, lora"),
        (["--search", "genetic"], "search"),
        (["--task", "segment"], "--task segment needs Google's vae-oid.npz"),
        (["--augment", "mosaic"], "augment"),
        (["--max-length", "8"], "holds nothing that PaliGemma could be trained on; train: "),
    ],
)
def test_a_wrong_request_is_one_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    folder = small_paligemma.make(tmp_path / "model", ends=False)
    path = write_set(tmp_path / "data", 4)
    capfd.readouterr()
    given = ["--data", str(path), "--model", str(folder), "--output", str(tmp_path / "out"), *arguments]
    assert paligemma.main(given) == 2
    err = capfd.readouterr().err.strip()
    assert said in err and len(err.splitlines()) == 1, err


def test_a_sweep_leaves_models_that_others_load(one_ray: str, tmp_path: Path) -> None:
    """A LoRA over its model, and the same folded in: Hugging Face's logits are alike, and no path is in the files."""
    folder = small_paligemma.make(tmp_path / "model", ends=False)
    path = write_set(tmp_path / "data")
    given = ["--data", str(path), "--model", str(folder), "--samples", "1", "--space", "none", "--epochs", "1"]
    given += ["--precision", "fp32", "--train", "weights=lora", "--train", "lr=0.01"]
    assert paligemma.main([*given, "--output", str(tmp_path / "lora")]) == 0
    assert paligemma.main([*given, "--output", str(tmp_path / "whole"), "--merge"]) == 0
    adapter, whole = tmp_path / "lora" / "best", tmp_path / "whole" / "best"
    assert inspect(str(folder), adapter=str(adapter)).adapter and inspect(str(whole)).parameters
    for file in adapter.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes() or file.name == "best.json"
    made = json.loads((adapter / "best.json").read_text())
    assert made["base"]["sha256"] == inspect(str(folder)).sha256 and made["metrics"]["train/loss"] > 0
    frame, prompt = small_paligemma.pictures(1)[0], PROMPTS[0]
    answers = [
        small_paligemma.Reference(folder, adapter).answer(frame, prompt, 8),
        small_paligemma.Reference(whole).answer(frame, prompt, 8),
        small_paligemma.Reference(folder).answer(frame, prompt, 8),
    ]
    assert answers[0][0] == answers[1][0]
    np.testing.assert_allclose(answers[0][1], answers[1][1], atol=1e-4)
    assert abs(answers[0][1][0] - answers[2][1][0]) > 1e-3  # it has learnt something


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("workers", "victim"), [(1, "ImplicitFunc"), (2, "ImplicitFunc"), (2, "ray::_work")])
def test_a_killed_process_in_a_sweep(tmp_path: Path, workers: int, victim: str) -> None:
    """`kill -9` of a trial's process, or of another that trains with it, after its first checkpoint: the epochs' losses
    of a sweep that nothing befell."""
    folder = small_paligemma.make(tmp_path / "model", ends=False)
    path = write_set(tmp_path / "data", 60)
    losses = []
    for name in ("whole", "killed"):
        out = tmp_path / name
        given = ["--data", str(path), "--model", str(folder), "--samples", "1", "--space", "none", "--epochs", "3"]
        more = f"--precision fp32 --train batch=2 --train dropout=0.1 --save-steps 5 --workers {workers}"
        command = [sys.executable, "-m", "tune.paligemma", *given, *more.split(), "--output", str(out)]
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        driver = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
        while name == "killed" and not list(out.glob("trials/*/checkpoint_*/state.pt")):
            assert driver.poll() is None
            time.sleep(0.05)
        killed = 0
        for process in psutil.Process(driver.pid).children(recursive=True) if name == "killed" else ():
            with suppress(psutil.NoSuchProcess):
                if victim in " ".join(process.cmdline()):
                    process.kill()
                    killed += 1
        assert bool(killed) == (name == "killed")
        assert driver.wait(600) == 0
        (row,) = pq.read_table(out / "trials.parquet").to_pylist()
        assert row["started"] == (2 if name == "killed" else 1)
        losses.append([[epoch["epoch"], epoch["train/loss"], epoch["val/loss"]] for epoch in row["history"]])
    np.testing.assert_allclose(losses[0], losses[1], atol=1e-5, rtol=0)


def _write_new_task(folder: Path, count: int, seed: int) -> Path:
    """Scenes, and a question that the demo's model has never seen, with an answer of a form of its own."""
    folder.mkdir()
    with (folder / "data.jsonl").open("w") as lines:
        for scene in scenes(count, seed):
            (folder / f"{scene.name}.jpg").write_bytes(jpeg(scene))
            largest = max(seen(scene), key=lambda shape: shape.area)
            answer = f"{largest.kind} / {largest.colour}"
            line = {"image": f"{scene.name}.jpg", "prefix": "biggest shape", "suffix": answer}
            lines.write(json.dumps(line) + "\n")
    return folder / "data.jsonl"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("weights", "lr", "epochs"), [("all", "3e-4", "7"), ("lora", "3e-3", "4")])
def test_a_task_never_seen_is_learnt(one_ray: str, tmp_path: Path, weights: str, lr: str, epochs: str) -> None:
    """The demo's model learns a new question on 1,200 scenes and answers it on others; what it leaves, in vLLM, gives
    Hugging Face's tokens."""
    base = WEIGHTS / "paligemma"
    data, val = (_write_new_task(tmp_path / name, n, seed) for name, n, seed in (("a", 1200, 41000), ("b", 150, 41001)))
    given = ["--data", str(data), "--val", str(val), "--model", str(base), "--output", str(tmp_path / "out")]
    given += ["--samples", "1", "--space", "none", "--epochs", epochs, "--train", f"weights={weights}"]
    given += ["--train", f"lr={lr}", "--train", "rank=16", "--train", "micro_batch=16"]
    assert paligemma.main(given) == 0
    best = tmp_path / "out" / "best"
    truth = [json.loads(line) for line in val.read_text().splitlines()]
    pairs = [(decode((val.parent / one["image"]).read_bytes())[0], one["prefix"]) for one in truth]
    model, lora = (base, best) if weights == "lora" else (best, None)
    limits = {"max_tokens": 16} | ({"adapter": str(lora)} if lora else {})
    before, after = ask([Asked(base, pairs, {"max_tokens": 16}), Asked(model, pairs, limits)], tmp_path)
    words = PaliGemmaProcessor.from_pretrained(base).tokenizer
    right = [
        float(np.mean([words.decode(ids, skip_special_tokens=True).strip() == one["suffix"]
                       for (ids, _), one in zip(answered.answers, truth, strict=True)]))
        for answered in (before, after)
    ]  # fmt: skip
    print(f"{weights}: {right[0]:.3f} before, {right[1]:.3f} after")
    assert right[0] < 0.05 and right[1] > 0.8
    reference = small_paligemma.Reference(model, lora)
    for (ids, _), (frame, prompt) in zip(after.answers, pairs, strict=True):
        assert ids == reference.answer(frame, prompt, 16)[0]
