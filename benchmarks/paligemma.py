"""Answers per second of ours, of vLLM's own LLM.generate and of ray.data.llm: `python -m benchmarks.paligemma`.

A PaliGemma of random weights whose answers never end early, so that all do the same work, at 224 and at 448 pixels, and
with one prompt a picture and with four. `engine` and `generate` are asked the same decoded pictures; `job` and
`ray_data_llm` go from JPEGs to Parquet. See measuring.py: the first answers, which each waits for its engine's start,
do not count for the rate.

`generate` has our plugin, and its tokens have to be the engine's. `generate_causal` and ray.data.llm, which starts vLLM
in another process, where the plugin refuses to run, see a prompt in one direction only, which is not PaliGemma.
ray.data.llm also keeps vLLM's cache of prefixes; in both directions a prefix depends on what follows, and none is kept.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import measuring
from benchmarks.measuring import done
from demo.scenes import scenes
from demo.writers import jpeg

FEW, TOKENS = 8, 16
SMALLER, LARGER = 224, 448
PROMPTS = ("caption en", "describe en", "answer en what colour is the car?", "answer en how many dogs are there?")
NAMES = {
    "job": "Shardsight's job, JPEG to Parquet",
    "ray_data_llm": "`ray.data.llm`, JPEG to Parquet",
    "engine": "Shardsight's engine",
    "generate": "vLLM's `LLM.generate`",
    "generate_causal": "the same without our plugin",
}
PEERS = ("generate", "ray_data_llm")
TASKS = {(SMALLER, 1): 400, (SMALLER, 4): 100, (LARGER, 1): 100, (LARGER, 4): 25}  # size, prompts a picture → pictures


def limits(size: int) -> dict[str, Any]:
    """Of vLLM, as our engine sets them."""
    tokens = (size // 14) ** 2 + 64
    return {
        "gpu_memory_utilization": 0.3,
        "max_model_len": tokens,
        "max_num_seqs": 32,
        "max_num_batched_tokens": max(2048, tokens),
    }


def draw(folder: Path, count: int) -> None:
    """So many scenes, of 224×224, as JPEGs."""
    folder.mkdir()
    for number, scene in enumerate(scenes(count, 1)):
        (folder / f"{number:05}.jpg").write_bytes(jpeg(scene))


def random_model(folder: Path, size: int, wide: int = 1) -> Path:
    """Whose tower is to its decoder as that of a PaliGemma of 3B. It has 7 million parameters; 60 million if 3 times
    as `wide`."""
    from tests.small_paligemma import as_published, make

    widths, layers = {"hidden_size": 128 * wide, "intermediate_size": 512 * wide}, {"num_hidden_layers": 6}
    tower = widths | layers | {"num_attention_heads": 4 * wide}
    decoder = {name: 2 * width for name, width in widths.items()} | layers | {"num_attention_heads": 4 * wide}
    decoder |= {"head_dim": 64, "max_position_embeddings": 2048}
    return as_published(make(folder, "gemma", ends=False, size=size, tower=tower, **decoder))


def engine(folder: str, out: str, model: str, size: int, prompts: int) -> None:
    from shardsight.models.paligemma.model import PaliGemma
    from shardsight.models.paligemma.prompts import Prompt

    asked = PaliGemma(model, max_tokens=TOKENS, precision="fp32")

    def ask(some: list[Any]) -> list[list[int]]:
        futures = [asked.ask(frame, Prompt.of(text)) for frame in some for text in PROMPTS[:prompts]]
        return [future.result().ids for future in futures]

    _noted(ask, folder, out, prompts)


def generate(folder: str, out: str, model: str, size: int, prompts: int) -> None:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    from PIL import Image
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {"enable_chunked_prefill": False, "enable_prefix_caching": False, "enforce_eager": True}
    asked = LLM(model, dtype="float32", **options, **limits(size))
    params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0, detokenize=False)

    def ask(some: list[Any]) -> list[list[int]]:
        pictures = [
            {"prompt": text + "\n", "multi_modal_data": {"image": Image.fromarray(one)}}
            for one in some
            for text in PROMPTS[:prompts]
        ]
        return [list(one.outputs[0].token_ids) for one in asked.generate(pictures, params, use_tqdm=False)]

    _noted(ask, folder, out, prompts)


def generate_causal(folder: str, out: str, model: str, size: int, prompts: int) -> None:
    os.environ["VLLM_PLUGINS"] = "none"
    generate(folder, out, model, size, prompts)


def _noted(ask: Callable[[list[Any]], list[list[int]]], folder: str, out: str, prompts: int) -> None:
    """Ask about a few frames, and about the others; leave the tokens, which must agree."""
    from shardsight.decode.pictures import decode

    frames = [decode(path.read_bytes())[0] for path in sorted(Path(folder).iterdir())]
    tokens = []
    for some in (frames[:FEW], frames[FEW:]):
        tokens += ask(some)
        done(len(some) * prompts)
    Path(out).mkdir(parents=True)
    (Path(out) / "tokens.json").write_text(json.dumps(tokens))


def job(folder: str, out: str, model: str, size: int, prompts: int) -> None:
    from benchmarks.contenders import annotate

    asked = [option for text in PROMPTS[:prompts] for option in ("--prompt", text)]
    annotate(folder, out, "--paligemma", model, *asked, "--max-tokens", TOKENS, "--precision", "fp32", each=prompts)


def ray_data_llm(folder: str, out: str, model: str, size: int, prompts: int) -> None:
    os.environ["VLLM_PLUGINS"] = "none"
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ray.init("local")  # and not what an earlier `ray start` left behind
    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={"dtype": "float32", "enforce_eager": True, **limits(size)},
        batch_size=32,
        concurrency=1,
        log_engine_metrics=False,  # which take more of Ray than is installed
        placement_group_config={"bundles": [{"CPU": 1}]},  # it would wait for a GPU
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
    )

    def preprocess(row: dict[str, Any]) -> dict[str, Any]:
        asked = {"prompt": row["prompt"] + "\n", "multimodal_data": {"image": row["image"]}}
        return asked | {"path": row["path"], "sampling_params": {"temperature": 0, "max_tokens": TOKENS}}

    def postprocess(row: dict[str, Any]) -> dict[str, Any]:
        done(1)
        return {"path": row["path"], "prompt": row["prompt"], "text": row["generated_text"]}

    processor = build_processor(config, preprocess=preprocess, postprocess=postprocess)
    rows = ray.data.read_images(folder, mode="RGB", include_paths=True)
    rows = rows.flat_map(lambda row: [row | {"prompt": text} for text in PROMPTS[:prompts]])
    processor(rows).write_parquet(out)


CONTENDERS: dict[str, Callable[[str, str, str, int, int], None]] = {
    function.__name__: function for function in (job, ray_data_llm, engine, generate, generate_causal)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, choices=(SMALLER, LARGER), action="append", help="both by default")
    parser.add_argument("--prompts", type=int, choices=(1, 4), action="append", help="both by default")
    parser.add_argument("--only", choices=list(CONTENDERS), action="append", help="repeatable; all by default")
    parser.add_argument("--run", nargs=6, help=argparse.SUPPRESS)
    args = measuring.arguments(parser)
    if args.run:
        name, folder, out, model, size, prompts = args.run
        CONTENDERS[name](folder, out, model, int(size), int(prompts))
        return
    names = args.only or list(CONTENDERS)
    with tempfile.TemporaryDirectory() as work:
        for (size, prompts), count in TASKS.items():
            if size in (args.size or [size]) and prompts in (args.prompts or [prompts]):
                text = compared(Path(work), names, size, prompts, count // 4 if args.quick else count, args)
                print(text)
                if args.record:
                    title = f"PaliGemma at {size}, {prompts} prompt{'s' * (prompts > 1)} a picture"
                    measuring.record(measuring.card(title, args), text)


def compared(work: Path, names: list[str], size: int, prompts: int, count: int, args: argparse.Namespace) -> str:
    """The table of one task. Exits where tokens of the engine are not those of vLLM's own with our plugin."""
    folder, outs, rounds = work / f"{size}-{prompts}", work / "outs", 1 if args.quick else args.rounds
    draw(folder, count)
    model = work / f"model-{size}"
    if not model.exists():
        random_model(model, size)

    def command(name: str, pictures: int) -> list[object]:
        shutil.rmtree(outs / name, ignore_errors=True)
        return ["benchmarks.paligemma", "--run", name, folder, outs / name, model, size, prompts]

    runs = measuring.contest(names, [count], rounds, command)
    if len({(outs / name / "tokens.json").read_text() for name in names if name in ("engine", "generate")}) > 1:
        sys.exit("the engine's tokens are not those of LLM.generate")
    work_done = (
        f"{count} pictures, prompts a picture: {prompts}, {TOKENS} tokens an answer, fp32, median of {rounds} rounds"
    )
    said = measuring.conditions(work_done, ("vllm", "ray", "torch"))
    return f"{measuring.table(runs, NAMES, PEERS, 'answers', rate=False)}\n\n{said}. {measuring.noise(runs)}\n"


if __name__ == "__main__":
    main()
