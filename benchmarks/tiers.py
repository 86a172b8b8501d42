"""What each tier of gpu_suite.py runs, what says most first.

`smoke` names every crash, `measure` brings what the README claims, `rest` what settles constants and fills tables.
Each fits a machine that is lent for fifteen minutes in all: 150 s, 300 s and 300 s with the transfers.
"""

from __future__ import annotations

from suite import Job

# Minutes of the jobs themselves; what is left of each tier's time are transfers and unpacking.
MINUTES = {"smoke": 2.1, "measure": 4.5, "rest": 4.5}
# Processes that share the tests; each compiles what the others have not.
SHARDS = 5
OURS = "ours-fused,ours-cublas,ours-torch"


def smoke(wide: bool) -> list[Job]:
    """`wide`: there is room for jobs side by side; else the tests are one job, and the demo comes behind the checks."""
    of = SHARDS if wide else 1
    check = lambda name, *checks, share=3.0: Job(
        f"smoke-{name}", "part_smoke.py", ["--checks", *checks], share, 20, "smoke", "smoke"
    )
    shard = lambda i: Job(
        f"tests-{i}", "part_tests.py", ["--shard", i, "--of", of], 24 / of, 30, beside="smoke", part="tests"
    )
    tests = [shard(i) for i in range(of)]
    return [
        check("imports", "imports", share=1),
        *tests,
        check("small-presets", "preset:8gb", "preset:4gb", "preset:6gb"),
        check("large-presets", "preset:12gb", "preset:16gb", "preset:24gb"),
        check("rollouts", "graphs:int8", "graphs:dense", "fused"),
        check("oom", "oom"),
        Job("demo", "part_train.py", ["--steps", "20"], 4, 20, "smoke", "train"),
    ]


def _memory(name: str, *args: str, share: float, beside: str = "") -> Job:
    return Job(f"memory-{name}", "part_memory.py", args, share, 40, beside, "memory")


def measure(wide: bool) -> list[Job]:
    models = {
        "0.5B": "Qwen2.5-0.5B", "1.5B": "Qwen2.5-1.5B", "7B": "Qwen2.5-7B", "8B": "Qwen3-8B",
        "streamed": "Qwen3-14B", "hybrid": "Qwen3.5-4B",
    }  # fmt: skip
    beside = ["--beside"] if wide else []
    under_8gb = [
        _memory(short, "--models", model, "--presets", "8gb", "--providers", "ours", *beside, share=16, beside="memory")
        for short, model in models.items()
    ]
    return [
        *under_8gb,
        Job("sweep", "bench_kernels.py",
            ["--ops", "train", "--rows", "4096", "--dtypes", "bfloat16", "--profiles", "peaked", "--seconds", "0.25",
             "--shapes", "qwen2.5-0.5b,qwen2.5-1.5b,llama3.1-8b"], 16, 25, part="kernels",
            dry=["--ops", "train", "--dtypes", "bfloat16", "--profiles", "peaked"]),
        Job("rollouts", "bench_rollout.py",
            ["--group", 8, 16, "--prompt", 256, "--rounds", 2, "--providers", "ours", "ours-eager", "hf-dynamic"],
            20, 30, part="rollouts", dry=["--providers", "ours", "ours-eager", "hf-dynamic"]),
        _memory("beside-trl", "--models", "Qwen2.5-0.5B", "--presets", "8gb", "--providers", "ours", "trl", share=18),
        Job("rivals-train", "part_rivals.py", ["--mode", "train", "--models", "1.5b"], 5, 30, part="rivals"),
    ]  # fmt: skip


def rest(wide: bool) -> list[Job]:
    beside = ["--beside"] if wide else []
    wide_heads = "qwen2.5-0.5b,qwen2.5-1.5b,width-2048,width-2560,width-3072,width-4096"
    other = "--ops", "train,loss,kl,int8,nf4,score", "--rows", "4096", "--seconds", "0.2"
    small = ["--ops", "train,loss,kl", "--dtypes", "float16", "--profiles", "mixed"]
    return [
        Job("fused-ops", "bench_rollout.py",
            ["--model", "Qwen2.5-0.5B", "Qwen2.5-7B", "--heads", "int8", "--group", 8, "--prompt", 256, "--rounds", 2,
             "--providers", "ours", "ours-fused", "ours-unfused", "ours-int8"], 12, 30, part="rollouts",
            dry=["--providers", "ours-fused", "ours-unfused"]),
        Job("profile", "part_profile.py", [], 10, 25, part="profile"),
        Job("decode-ops", "bench_decode_ops.py", ["--seconds", "0.1"], 8, 20, part="kernels"),
        Job("widths", "bench_kernels.py",
            ["--ops", "train,dense", "--rows", "4096", "--dtypes", "bfloat16", "--profiles", "peaked", "--seconds",
             "0.2", "--shapes", wide_heads, "--providers", "ours-fused,ours-cublas"], 10, 25, part="kernels",
            dry=["--ops", "dense", "--dtypes", "bfloat16"]),
        Job("knobs", "part_knobs.py", [], 8, 25, part="rollouts"),
        Job("attention", "part_memory.py",
            ["--models", "Qwen2.5-0.5B", "--attention", "sdpa", "xformers"], 9, 30, part="memory"),
        Job("training-ops", "part_memory.py",
            ["--models", "Qwen2.5-0.5B", "--fused-ops", "off", "auto", "on"], 10, 40, part="memory"),
        Job("decode-attention", "bench_decode_attention.py", ["--seconds", "0.1"], 5, 20, part="kernels"),
        _memory("3B", "--models", "Qwen2.5-3B", "--presets", "8gb", "6gb", "--providers", "ours", *beside, share=5,
                beside="untimed"),
        _memory("small-caps", "--models", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "--presets", "4gb", "--providers", "ours",
                *beside, share=5, beside="untimed"),
        _memory("14B", "--models", "Qwen3-14B", "--presets", "12gb", "--providers", "ours", *beside, share=5,
                beside="untimed"),
        Job("learning", "part_train.py", ["--steps", "60", "--learn"], 4, 25, "untimed", "train"),
        Job("other-kernels", "bench_kernels.py",
            [*other, "--dtypes", "float16,bfloat16", "--shapes", "qwen2.5-0.5b,llama3.1-8b"], 8, 25, part="kernels",
            dry=small),
        Job("rivals-loss", "part_rivals.py", ["--mode", "loss"], 4, 25, part="rivals"),
        # torch.compile takes minutes: last.
        Job("compiled", "bench_kernels.py",
            ["--ops", "train,loss", "--rows", "4096", "--dtypes", "bfloat16", "--profiles", "peaked", "--shapes",
             "qwen2.5-0.5b", "--providers", "liger-compiled,compiled"], 3, 30, part="kernels",
            dry=["--ops", "loss", "--providers", "compiled"]),
    ]  # fmt: skip


TIERS = {"smoke": smoke, "measure": measure, "rest": rest}
PARTS = ("tests", "smoke", "train", "memory", "kernels", "rollouts", "rivals", "profile")


def jobs(tiers: list[str], wide: bool, only: set[str] | None = None) -> list[Job]:
    """Of these tiers, in order; `only`: those with one of these names or parts."""
    found = [job for tier in tiers for job in TIERS[tier](wide)]
    return [job for job in found if only is None or {job.name, job.part} & only]
