"""Checks of the generation path: contexts, greedy text, guided denoising, and whole requests."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from loom_jax.converters.parity.port import Port, channels_first, channels_last
from loom_jax.converters.parity.records import Checked, Records
from loom_jax.data import Budget, Packable, Streams, pack
from loom_jax.document import EncodedSegment, ImageTokens, LayoutState, TextTokens, lay_out, pack_latent
from loom_jax.generate import (
    Context,
    Engine,
    Generator,
    Guidance,
    ImageSettings,
    Request,
    Source,
    TextControls,
    TextSettings,
    branch_segments,
    branch_velocity,
    count_branches,
    extrapolate,
    forecast_velocity,
    guidance_is_active,
    guide,
    make_guidance,
    since_full,
    start_forecast,
)
from loom_jax.nn import denoising_schedule


class RecordedNoise:
    """The draws of one recorded case, in place of seeds."""

    def __init__(self, posterior: Sequence[np.ndarray] = (), initial: np.ndarray | None = None):
        self._posterior, self._initial = posterior, initial

    def posterior(self, seed: int, image: int, grid: tuple[int, int], channels: int) -> np.ndarray:
        return channels_last(self._posterior[image])[0]

    def initial(self, seed: int, number: int, cells: int, channels: int) -> np.ndarray:
        assert self._initial is not None
        return self._initial


@functools.cache
def engine(port: Port) -> Engine:
    """Returns the compiled calls, shared by all checks."""
    return Engine(port.model, port.vae, port.encoder.special, len(port.encoder.tokenizer))


def generator(port: Port, noise: RecordedNoise) -> Generator:
    """Returns a generator that draws what was recorded."""
    return Generator(port.config, engine(port), port.encoder, noise)


def posterior_noise(records: Records, file: str, prefix: str) -> list[np.ndarray]:
    """Returns the recorded posterior noises `PREFIX0`, `PREFIX1`, ... of a file."""
    arrays = records.arrays(file)
    return [arrays[name] for name in sorted(arrays) if name.startswith(prefix)]


def _text(port: Port, text: str) -> TextTokens:
    return TextTokens(port.encoder.tokenizer.encode(text))


def _condition(port: Port, records: Records, roles: Sequence[Any]) -> list[EncodedSegment]:
    """The recorded input picture in some roles, resized as the original does before it shows it to anything."""
    pictures = port.encoder.condition_pictures(records.picture("infer_ctx", "image"), roles)
    return port.encoder.encode(pictures)


def _latents(port: Port, segments: Sequence[EncodedSegment], noise: np.ndarray) -> tuple[np.ndarray, ...]:
    """Latent tokens of each clean picture of a document; all records have at most one."""
    out = []
    for segment in segments:
        if isinstance(segment, ImageTokens) and segment.role == "clean":
            assert segment.pixels is not None
            latents = engine(port).encode_image(segment.pixels, channels_last(noise)[0])
            out.append(pack_latent(latents, port.config.latent_patch_size))
    return tuple(out)


def check_infer_ctx(records: Records, port: Port) -> Checked:
    """Keys and values after reading text and pictures."""
    r, prompts = records.arrays("infer_ctx"), records.settings
    picture = port.encoder.condition_pictures(records.picture("infer_ctx", "image"), ("clean", "vit"))
    clean, vit = port.encoder.encode(picture)
    assert isinstance(clean, ImageTokens) and isinstance(vit, ImageTokens)
    texts = {name: _text(port, prompts[f"{name}_prompt"]) for name in ("gen", "edit", "vqa", "continue")}
    cases: dict[str, list[EncodedSegment]] = {
        "text": [texts["gen"]],
        "vae": [clean],
        "vae_vit": [clean, vit],
        "edit": [clean, vit, texts["edit"]],
        "und": [texts["continue"], vit, texts["vqa"]],
    }
    assert clean.pixels is not None and vit.pixels is not None
    computed: dict[str, Any] = {
        "image_resized": np.asarray(picture[0].image),
        "vae_pixels": channels_first(clean.pixels),
        "vit_pixels": channels_first(vit.pixels),
    }
    computed |= {f"text_ids_{name}": np.asarray(text.ids) for name, text in texts.items()}
    made = generator(port, RecordedNoise())
    for name, segments in cases.items():
        read = made.read([segments], [_latents(port, segments, r["vae_noise"])])
        computed |= _context_arrays(name, read.context, r)
    return Checked({n: v for n, v in computed.items() if n in r}, {"image", "vae_noise"})


def _context_arrays(name: str, context: Context, recorded: dict[str, np.ndarray]) -> dict[str, Any]:
    """The parts of a context that were recorded under a name."""
    length = int(context.length[0])
    out: dict[str, Any] = {f"{name}_kv_len": context.length, f"{name}_rope": context.position}
    for layer in range(context.kv.k.shape[0]):
        out[f"{name}_k{layer}"] = context.kv.k[layer, 0, :length]
        out[f"{name}_v{layer}"] = context.kv.v[layer, 0, :length]
    return {key: value for key, value in out.items() if key in recorded}


def text_cases(records: Records, port: Port) -> dict[str, list[EncodedSegment]]:
    """The documents after which text was written."""
    prompts = records.settings
    vqa = [*_condition(port, records, ("vit",)), _text(port, prompts["vqa_prompt"])]
    return {"text_only": [_text(port, prompts["continue_prompt"])], "with_image": vqa}


def greedy_logits(port: Port, segments: list[EncodedSegment], ids: Sequence[int]) -> tuple[Context, np.ndarray]:
    """Feeds the begin mark and then given tokens after a document: the context afterwards, the logits [T, vocab]."""
    made = generator(port, RecordedNoise())
    read = made.read([segments], [()], room=len(ids))
    end = read.ends[0]
    streams = _causal_streams(port, ids, end)
    latents = np.zeros((1, 0, port.config.latent_dim), np.float32)
    position, split = np.asarray([end.position + len(ids)]), np.asarray([end.split + 1])
    context, logits = engine(port).extend(read.context, streams, latents, position, split)
    return context, np.asarray(logits[0])


def _causal_streams(port: Port, ids: Sequence[int], start: LayoutState) -> Streams:
    """A row of tokens that go on after a document, without an end mark."""
    segment = TextTokens(ids[1:])
    layout = lay_out([segment], port.encoder.special, start)
    batch = pack([[Packable([segment], layout)]], Budget(len(ids) + 1, 0, 0), port.tables)
    s = batch.streams
    return s._replace(
        und=type(s.und)(*(a[:, :-1] for a in s.und)), token_ids=s.token_ids[:, :-1], vit_index=s.vit_index[:, :-1]
    )


def check_gen_text(records: Records, port: Port) -> Checked:
    """Greedy text: the compiled loop's ids, and the logits behind them.

    The original returns the begin mark and all but the last prediction; ours returns every prediction.
    """
    r, out = records.arrays("gen_text"), Checked()
    made = generator(port, RecordedNoise())
    for name, segments in text_cases(records, port).items():
        count = len(r[f"{name}_ids"])
        read = made.read([segments], [()], room=count + 1)
        keys = jax.random.split(jax.random.key(0), 1)
        greedy = TextControls(jnp.float32(0), jnp.float32(1))
        decoded = engine(port).decode_text(read.context, keys, greedy, count, buffer=count)
        ids = [port.encoder.special.bos, *np.asarray(decoded.tokens)[0, : count - 1].tolist()]
        context, logits = greedy_logits(port, segments, ids)
        best = np.sort(logits, axis=-1)
        length = int(context.length[0])
        out.computed |= {
            f"{name}_ids": np.asarray(ids),
            f"{name}_logits": logits,
            f"{name}_margin": best[:, -1] - best[:, -2],
            f"{name}_final_k0": context.kv.k[0, 0, :length],
        }
    return out


def image_settings(case: dict[str, Any]) -> ImageSettings:
    """Returns the settings of a recorded case."""
    return ImageSettings(
        num_timesteps=case["num_timesteps"],
        timestep_shift=case["timestep_shift"],
        cfg_text_scale=case["cfg_text_scale"],
        cfg_img_scale=case["cfg_img_scale"],
        cfg_interval=(case["cfg_interval"][0], case["cfg_interval"][1]),
        cfg_renorm_min=case.get("cfg_renorm_min", 0.0),
        cfg_renorm_type=case["cfg_renorm_type"],
    )


def picture_sources(records: Records, port: Port) -> dict[str, Source]:
    """The two requests behind gen_image.npz: a picture from text, and an edit of the input picture."""
    r, prompts = records.arrays("gen_image"), records.settings
    height, width = prompts["gen_hw"]
    edit: list[EncodedSegment] = [*_condition(port, records, ("clean", "vit")), _text(port, prompts["edit_prompt"])]
    latents = _latents(port, edit, r["edit_ctx_vae_noise_0"])
    text = Request((prompts["gen_prompt"],), "image")
    return {
        "t2i": Source(text, (_text(port, prompts["gen_prompt"]),), (), (height, width)),
        "edit": Source(text, tuple(edit), latents, (height, width)),
    }


BRANCHES = ("cond", "text", "img")
CONTEXTS = ("gen", "cfg_text", "cfg_img")


@functools.partial(jax.jit, static_argnames=("graphdef", "renorm"))
def _trace_steps(
    graphdef: Any, params: Any, contexts: Any, streams: Any, x: Any, schedule: Any, guidance: Guidance, renorm: Any
) -> Any:
    """Denoises step by step with every branch's velocity kept, NaN where the original did not evaluate it."""
    model = nnx.merge(graphdef, params)
    held = streams[0].gen.document >= 0
    with_image = (guidance.image_scale > 1).all()

    def step(x: jax.Array, times: jax.Array) -> tuple[jax.Array, Any]:
        t, following = times
        v = [branch_velocity(model, c, s, x, t) for c, s in zip(contexts, streams, strict=True)]
        active = guidance_is_active(guidance, t)
        guided = guide(v[0], v[1], v[2], guidance, renorm, held)
        chosen = jnp.where(active, guided, v[0])
        text = jnp.where(active, v[1], jnp.nan)
        image = jnp.where(active & with_image, v[2], jnp.nan)
        return x - chosen * (t - following), (x, chosen, v[0], text, image, active)

    return jax.lax.scan(step, x, jnp.stack([schedule[:-1], schedule[1:]], axis=1))


def check_gen_image(records: Records, port: Port) -> Checked:
    """Every guidance setting: velocities of each step and branch, and what the compiled loop makes of them."""
    r, cases = records.arrays("gen_image"), records.json("gen_image_cases")
    out = Checked(inputs={n for n in r if "noise" in n})
    graphdef, params = nnx.split(port.model)
    for source_name, source in picture_sources(records, port).items():
        contexts, streams, arrays = _read_branches(port, source_name, source)
        out.computed |= {n: v for n, v in arrays.items() if n in r}
        noise = r[f"{source_name}_init_noise"]
        for name, case in cases.items():
            if case["context"] != source_name:
                continue
            settings = image_settings(case)
            schedule = denoising_schedule(settings.num_timesteps, settings.timestep_shift)
            guidance = make_guidance(settings, [settings.cfg_img_scale])
            renorm = settings.cfg_renorm_type
            x = jnp.asarray(noise[None])
            _, steps = _trace_steps(graphdef, params, contexts, streams, x, schedule, guidance, renorm=renorm)
            made = generator(port, RecordedNoise(initial=noise))
            latent = made.draw([source], [None], settings)[0]
            traced = dict(zip(("x", "v", "v_cond", "v_text", "v_img"), (s[:, 0] for s in steps[:5]), strict=True))
            computed = {f"{name}_{key}": value for key, value in traced.items()}
            computed |= {f"{name}_latent": latent, f"{name}_image": np.asarray(made.picture(latent, source.size))}
            if f"{source_name}_t" in r and settings.timestep_shift == 3.0:
                computed[f"{source_name}_t"] = schedule[:-1]
            out.computed |= {n: v for n, v in computed.items() if n in r}
    return out


def _read_branches(port: Port, name: str, source: Source) -> tuple[list[Context], list[Streams], dict[str, Any]]:
    """Contexts and queries of the three branches, one by one, and what was recorded of them."""
    made = generator(port, RecordedNoise())
    stride = port.config.latent_stride
    query = ImageTokens("noisy", (source.size[0] // stride, source.size[1] // stride))
    cells = query.grid[0] * query.grid[1]
    latents = (source.latents, source.latents, ())
    contexts, streams, arrays = [], [], {}
    for kind, segments, images in zip(CONTEXTS, branch_segments(source, None), latents, strict=True):
        read = made.read([segments], [images])
        layout = lay_out([query], port.encoder.special, read.ends[0])
        contexts.append(read.context)
        streams.append(pack([[Packable([query], layout)]], Budget(2, cells, 0), port.tables).streams)
        arrays[f"{name}_{kind}_kv_len"] = read.context.length
        arrays[f"{name}_{kind}_rope"] = layout.tokens.position[:1]
    return contexts, streams, arrays


def check_gen_image_cases(records: Records, port: Port) -> Checked:
    """At which steps guidance acts; all else in this file are settings, used by the check of gen_image."""
    out = Checked()
    for name, case in records.json("gen_image_cases").items():
        settings = image_settings(case)
        times = denoising_schedule(settings.num_timesteps, settings.timestep_shift)[:-1]
        active = [bool(guidance_is_active(make_guidance(settings, [settings.cfg_img_scale]), t)) for t in times]
        out.computed[name] = {**case, "cfg_active_steps": active}
    return out


TAYLOR_CASES: dict[str, dict[str, Any]] = {
    "edit": {},
    "nocfg": {"cfg_text_scale": 1.0, "cfg_img_scale": 1.0},
    "late": {"cfg_interval": (0.2, 0.9)},
}
"""What the recorded runs with TaylorSeer differ in."""


def taylor_settings(case: str) -> ImageSettings:
    """Returns the settings of a recorded run with TaylorSeer."""
    return ImageSettings(**({"num_timesteps": 20, "cfg_img_scale": 2.0, "taylorseer": True} | TAYLOR_CASES[case]))


@functools.partial(jax.jit, static_argnames=("graphdef", "branches", "renorm"))
def _trace_forecast(
    graphdef: Any,
    params: Any,
    contexts: Any,
    streams: Any,
    x: Any,
    schedule: Any,
    guidance: Guidance,
    branches: int,
    renorm: Any,
) -> Any:
    """Denoises one request with TaylorSeer: of each step the velocity, the conditional one, and which branches of it
    were evaluated and ran the layers, bool [steps, R]."""
    model = nnx.merge(graphdef, params)
    velocity = forecast_velocity(model, contexts, streams, guidance, branches, renorm)

    def step(carry: Any, times: jax.Array) -> tuple[Any, Any]:
        x, before = carry
        v, after = velocity(x, times[0], before)
        hidden = extrapolate(after.factors[:, 0], since_full(before.counts[0]).astype(jnp.float32))
        advanced = jnp.repeat(
            after.counts - before.counts, jnp.asarray([1, branches - 1]), total_repeat_length=branches
        )
        ran = (after.factors[0] != before.factors[0]).any((1, 2))
        conditional = model.velocity(model.decoder.norm.gen(hidden))
        return (x - v * (times[0] - times[1]), after), (v[0], conditional, advanced > 0, ran)

    start = start_forecast(branches, x.shape[1], model.config.decoder.hidden_size)
    return jax.lax.scan(step, (x, start), jnp.stack([schedule[:-1], schedule[1:]], axis=1))[1]


@functools.cache
def check_taylor(records: Records, port: Port) -> Checked:
    """TaylorSeer: velocities and kinds of all steps, and the latents that the compiled loop makes with and without."""
    graphdef, params = nnx.split(port.model)
    source = picture_sources(records, port)["edit"]
    noise = records.arrays("gen_image")["edit_init_noise"]
    made, out = generator(port, RecordedNoise(initial=noise)), Checked()
    for name in TAYLOR_CASES:
        settings = taylor_settings(name)
        branches = count_branches(settings, pictures=True)
        schedule = denoising_schedule(settings.num_timesteps, settings.timestep_shift)
        guidance = make_guidance(settings, [settings.cfg_img_scale])
        read = made.read(branch_segments(source, None)[:branches], (source.latents, source.latents, ())[:branches])
        query = ImageTokens("noisy", tuple(side // port.config.latent_stride for side in source.size))
        rows = [[Packable([query], lay_out([query], port.encoder.special, end))] for end in read.ends]
        work = read.context, pack(rows, Budget(2, len(noise), 0), port.tables).streams
        v, v_cond, advanced, ran = _trace_forecast(
            graphdef, params, *work, noise[None], schedule, guidance, branches=branches, renorm=settings.cfg_renorm_type
        )
        for row, branch in enumerate(BRANCHES[:branches]):
            out.computed[f"{name}_types_{branch}"] = np.asarray(ran)[np.asarray(advanced)[:, row], row].astype(np.int32)
        exact = dataclasses.replace(settings, taylorseer=False)
        latent, exact_latent = (made.draw([source], [None], s)[0] for s in (settings, exact))
        arrays = {"v": v, "v_cond": v_cond, "latent": latent, "latent_exact": exact_latent}
        out.computed |= {f"{name}_{key}": value for key, value in arrays.items()}
    return out


def run_pipeline(records: Records, port: Port) -> dict[str, Any]:
    """Returns the result of every recorded request."""
    results = {}
    for name, case in records.json("pipeline").items():
        settings, r = case["settings"], records.arrays("pipeline")
        pictures = iter([records.picture("pipeline", "image"), records.picture("pipeline", "image2")])
        items = tuple(next(pictures) if item == "<image>" else item for item in case["inputs"])
        understand = settings.get("understanding_output", False)
        drawing = "edit" if "<image>" in case["inputs"] else "image"
        size = settings.get("image_shapes")
        request = Request(
            items,
            "understand" if understand else drawing,  # type: ignore[arg-type]
            settings.get("think", False),
            None if size is None else (size[0], size[1]),
        )
        noise = RecordedNoise(posterior_noise(records, "pipeline", f"{name}_vae_noise_"), r.get(f"{name}_init_noise"))
        # The original drops the last prediction: it feeds max_think_token_n tokens, the begin mark among them.
        text = TextSettings(settings["max_think_token_n"] - 1)
        results[name] = generator(port, noise).generate([request], image_settings(settings), text)[0]
    return results


_cached_pipeline = functools.cache(run_pipeline)


def check_pipeline(records: Records, port: Port) -> Checked:
    """Whole requests: pictures and their latents."""
    r = records.arrays("pipeline")
    out = Checked(inputs={n for n in r if "noise" in n or n in ("image", "image2")})
    for name, result in _cached_pipeline(records, port).items():
        if result.image is not None:
            out.computed |= {f"{name}_image": np.asarray(result.image), f"{name}_latent": result.latents}
    return out


def check_pipeline_json(records: Records, port: Port) -> Checked:
    """Whole requests: texts and thoughts; requests without either hold settings alone."""
    out = Checked()
    for name, result in _cached_pipeline(records, port).items():
        case = records.json("pipeline")[name]
        if "text" in case:
            out.computed[name] = {**case, "text": result.thought if result.text is None else result.text}
        else:
            out.inputs.add(name)
    return out


def check_checks(records: Records, port: Port) -> Checked:
    """Diagnostics of the original that can be recomputed: greedy texts, how close their choices were, and how far
    TaylorSeer leads away."""
    recorded, out = records.json("checks"), Checked()
    sources: dict[str, tuple[list[EncodedSegment], str | None]] = {
        f"gen_text_{name}": (segments, None) for name, segments in text_cases(records, port).items()
    }
    for name, (segments, _) in sources.items():
        if name not in recorded:
            continue
        ids = recorded[name]["ids"]
        _, logits = greedy_logits(port, segments, ids)
        chosen = [ids[0], *np.argmax(logits[:-1], axis=-1).tolist()]
        best = np.sort(logits, axis=-1)
        out.computed[name] = {
            "ids": chosen,
            "text": port.encoder.tokenizer.decode(chosen),
            "min_margin": _near((best[:, -1] - best[:, -2]).min(), recorded[name]["min_margin"]),
        }
    taylor = check_taylor(records, port).computed
    for case in TAYLOR_CASES:
        name, exact = f"taylor_{case}_rel_diff_to_exact", taylor[f"{case}_latent_exact"]
        difference = np.linalg.norm(taylor[f"{case}_latent"] - exact) / np.linalg.norm(exact)
        out.computed[name] = _near(float(difference), recorded[name])
    return out


def _near(actual: float, recorded: float) -> float:
    """Returns the record where the value agrees with it to 1e-3, else the value."""
    return recorded if abs(actual - recorded) <= 1e-3 * abs(recorded) else float(actual)
