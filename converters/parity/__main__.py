"""`python -m loom_jax.converters.parity SET --report R.json [--only NAME]`."""

from __future__ import annotations

import fnmatch
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loom_jax.converters.parity import generation, inputs, loom, optim, packs, parts, rows, training
from loom_jax.converters.parity.port import Port, open_port
from loom_jax.converters.parity.records import Checked, Records
from loom_jax.converters.parity.report import FORWARD, MANY_STEPS, compare, write_report
from loom_jax.core import InputError
from loom_jax.core.command import ArgumentParser, run_command

CHECKS: dict[str, Callable[[Records, Port], Checked]] = {
    "transforms.npz": inputs.check_transforms,
    "tokenizer.json": inputs.check_tokenizer,
    "pos.npz": parts.check_pos,
    "rope.npz": parts.check_rope,
    "time.npz": parts.check_time,
    "mask.npz": parts.check_mask,
    "pack_extra.npz": packs.check_pack_extra,
    "pack_rows.npz": rows.check_pack_rows,
    "pack_rows.json": rows.check_pack_rows_json,
    "packing_loop.json": rows.check_packing_loop,
    "vit.npz": parts.check_vit,
    "vae.npz": parts.check_vae,
    "mot_layer.npz": parts.check_mot_layer,
    "llm_und.npz": parts.check_llm_und,
    "train.npz": training.check_train,
    "train_alt.npz": training.check_train_alt,
    "train_grads.npz": training.check_train_grads,
    "optim.npz": optim.check_optim,
    "mfu.json": optim.check_mfu,
    "infer_ctx.npz": generation.check_infer_ctx,
    "gen_text.npz": generation.check_gen_text,
    "gen_image.npz": generation.check_gen_image,
    "gen_image_cases.json": generation.check_gen_image_cases,
    "taylor.npz": generation.check_taylor,
    "pipeline.npz": generation.check_pipeline,
    "pipeline.json": generation.check_pipeline_json,
    "checks.json": generation.check_checks,
    "loom.npz": loom.check_loom,
    "loom.json": loom.check_loom_json,
}
"""The check of each recorded file."""

TOLERANCES = {
    "train_grads.npz": MANY_STEPS,
    "optim.npz": MANY_STEPS,
    "gen_image.npz": MANY_STEPS,
    "taylor.npz": MANY_STEPS,
    "pipeline.npz": MANY_STEPS,
}
"""Tolerances other than that of a single forward pass."""

EXCUSED = {
    "loom.json/understanding_with_image": "the published program cannot understand pictures, this one can",
    "checks.json/pipeline_*_min_margin": "how close the original's own choices were; the texts chosen are compared",
    "checks.json/flex_vs_dense_max_abs": "the original's two paths against each other; both are compared with ours",
}
"""What is not recomputed yet, by FILE/ARRAY pattern, and why."""


def examine(records: Records, port: Port, only: str | None = None) -> dict[str, Any]:
    """Returns the report: every recorded array in one of `arrays`, `inputs`, `uncovered`."""
    report: dict[str, list[dict[str, Any]]] = {"arrays": [], "inputs": [], "uncovered": []}
    for file in records.files():
        if only is not None and only not in (file, file.rpartition(".")[0]):
            continue
        checked = CHECKS[file](records, port) if file in CHECKS else Checked()
        for array in records.names(file):
            _place(report, records, file, array, checked)
    return report


def _place(report: dict[str, Any], records: Records, file: str, array: str, checked: Checked) -> None:
    """Puts one recorded array into the list it belongs to."""
    named = {"file": file, "array": array}
    if array in checked.computed:
        tolerance = TOLERANCES.get(file, FORWARD)
        expected = records.expected(file, array)
        found = compare(
            checked.computed[array], expected, tolerance, checked.masks.get(array), checked.scales.get(array)
        )
        report["arrays"].append({**named, **found._asdict(), "tolerance": tolerance})
    elif array in checked.inputs:
        report["inputs"].append(named)
    else:
        patterns = [p for p in EXCUSED if fnmatch.fnmatch(f"{file}/{array}", p)]
        reason = EXCUSED[patterns[0]] if patterns else None
        report["uncovered"].append({**named, "reason": reason or "no check covers it", "excused": bool(patterns)})


def summarize(report: dict[str, Any]) -> tuple[bool, str]:
    """Returns whether all holds, and what to say of it."""
    wrong = [a for a in report["arrays"] if not a["ok"]]
    missing = [u for u in report["uncovered"] if not u["excused"]]
    lines = [
        f"  {a['file']} {a['array']}: max difference {a['max_abs']:.3g}, {a['max_rel']:.3g} of rms, "
        f"allowed {a['tolerance']:g}"
        for a in wrong
    ]
    lines += [f"  {u['file']} {u['array']}: {u['reason']}" for u in missing]
    lines.append(
        f"{len(report['arrays']) - len(wrong)} of {len(report['arrays'])} arrays within tolerance, "
        f"{len(report['inputs'])} inputs, {len(report['uncovered']) - len(missing)} excused, {len(missing)} uncovered"
    )
    return not wrong and not missing, "\n".join(lines)


def main(argv: list[str]) -> int:
    """Runs the comparison; 0 if everything recorded is within tolerance or excused by name, else 1."""
    parser = ArgumentParser(
        prog="python -m loom_jax.converters.parity",
        description="Recompute every recorded array of the PyTorch original and report the differences.",
        epilog="example:\n  python -m loom_jax.converters.parity ../shared/reference/bagel_tiny --report parity.json",
    )
    parser.add_argument("set", type=Path, metavar="SET", help="folder with ckpt/, golden/ and set_config.json")
    parser.add_argument("--report", type=Path, required=True, metavar="R.json", help="where to write the report")
    parser.add_argument("--only", metavar="NAME", help="one recorded file, such as vae or pipeline.json")
    args = parser.parse_args(argv)
    records = Records(args.set)
    if args.only is not None and args.only not in {n for f in records.files() for n in (f, f.rpartition(".")[0])}:
        raise InputError(f"--only {args.only}: no such record; there are {', '.join(records.files())}")
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    report = examine(records, open_port(records), args.only)
    write_report(report, args.report)
    ok, text = summarize(report)
    print(text)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(run_command("parity", main, sys.argv[1:]))
