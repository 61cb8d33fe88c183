"""The checkpoints of a run: trainable weights, optimizer, counters; whole or absent; the newest good one is found again.

checkpoints/step_00000120/
    state.json              step, samples seen, ranks, names of the trained tensors, size of every file
    trainable.safetensors   trained parameters and all buffers, by their names in the bare model
    optimizer.pt            plain data only (torch.load with weights_only)
    kept_NAME.pt            what `Run.keep` was given (an EMA)
    deepspeed/              under DeepSpeed in place of optimizer.pt: its own files, one part per rank
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from mmkit.checkpoint import atomic_folder, load_weights, save_weights
from mmkit.errors import ConfigError, DataError
from mmkit.ranks import broadcast, gather


def trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Collect the trained parameters and the saved buffers of a bare model, by name; under ZeRO-3 all ranks must call it."""
    sharded = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    state: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with _whole([parameter]) if sharded else nullcontext():
                state[name] = parameter.detach().cpu().clone() if sharded else parameter.detach()
    saved = model.state_dict().keys() if not sharded else None
    for name, buffer in model.named_buffers():
        if saved is None or name in saved:
            state[name] = buffer.detach()
    return state


def whole_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor] | None:
    """Collect all weights and saved buffers of a prepared model by their names in the bare one; all ranks must call it.

    Returns:
        Under ZeRO-3 copies on the CPU, on the first rank alone (None elsewhere); otherwise the model's own tensors, on each rank.
    """
    bare: nn.Module = accelerator.unwrap_model(model)
    if any(hasattr(parameter, "ds_id") for parameter in bare.parameters()):
        gathered: dict[str, Tensor] | None = accelerator.get_state_dict(model)
        return gathered
    return dict(bare.state_dict())  # not Accelerate's copy, in which tied weights are no longer one


def _whole(parameters: list[nn.Parameter]) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def save_snapshot(
    folder: Path, accelerator: Accelerator, model: nn.Module, optimizer: Any, kept: dict[str, Any], counters: dict[str, Any], keep_last: int
) -> Path:
    """Write `folder/step_N` from all ranks; older ones than the last `keep_last` go away afterwards.

    Args:
        folder: The run's `checkpoints`.
        accelerator: The run's.
        model: The prepared model.
        optimizer: The prepared optimizer.
        kept: Name to object with `state_dict()`.
        counters: At least "step"; written into state.json.
        keep_last: 0 keeps all.

    Raises:
        OSError: It cannot be written, on a full disk for instance; the older checkpoints are as they were.
    """
    bare = accelerator.unwrap_model(model)
    sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
    target = folder / f"step_{counters['step']:08d}"
    state = trained_state(bare)
    context = atomic_folder(target, overwrite=True) if accelerator.is_main_process else nullcontext()
    with context as opened:
        work = Path(broadcast(str(opened)))
        failure: Exception | None = None
        try:
            if accelerator.is_main_process:
                _write_main(work, accelerator, state, optimizer, kept, sharded)
            if sharded:
                model.save_checkpoint(str(work), tag="deepspeed", exclude_frozen_parameters=True, save_latest=False)  # type: ignore[operator]
        except (OSError, RuntimeError) as error:
            failure = error
        failures = [message for message in gather(str(failure) if failure else "") if message]
        if failures:
            raise OSError(f"cannot write checkpoint {target}: {failures[0]}") from failure
        if accelerator.is_main_process:
            files = {str(path.relative_to(work)): path.stat().st_size for path in sorted(work.rglob("*")) if path.is_file()}
            names = [name for name, parameter in bare.named_parameters() if parameter.requires_grad]
            content = {**counters, "ranks": accelerator.num_processes, "deepspeed": sharded, "trained": names, "files": files}
            (work / "state.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process and keep_last > 0:
        for old in sorted(folder.glob("step_*"))[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _write_main(
    work: Path, accelerator: Accelerator, state: dict[str, Tensor], optimizer: Any, kept: dict[str, Any], sharded: bool
) -> None:
    save_weights(state, work / "trainable.safetensors")
    if not sharded:
        content = {
            "optimizer": optimizer.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
        }
        torch.save(content, work / "optimizer.pt")
    for name, thing in kept.items():
        torch.save(thing.state_dict(), work / f"kept_{name}.pt")


def resume_point(folder: Path, global_batch_size: int, is_main: bool) -> tuple[Path | None, dict[str, Any]]:
    """Find the newest whole checkpoint, from all ranks, and clear away what a killed process left half written.

    Args:
        folder: The run's `checkpoints`.
        global_batch_size: Samples in a step now.
        is_main: On the rank that looks, and prints a line for each checkpoint that it has to pass over.

    Returns:
        Its folder and counters; None and nothing if the run has not saved any yet.

    Raises:
        ConfigError: There are checkpoints and none is whole, or the steps held another number of samples.
    """
    found, faults = broadcast(_find_snapshot(folder) if is_main else None)
    for path, fault in faults.items() if is_main and found else ():
        print(f"checkpoint {path} is passed over: {fault}; the newest whole one is {found}", flush=True)
    if found is None:
        if faults:
            raise ConfigError(
                f"--resume: none of the {len(faults)} checkpoints in {folder} is whole, the newest one's fault: {next(iter(faults.values()))}."
                " Put the file back, or start anew with --overwrite"
            )
        return None, {}
    state = read_state(found)
    if state["global_batch_size"] != global_batch_size:
        raise ConfigError(
            f"{found} was made with {state['global_batch_size']} samples in a step, the settings now make it "
            f"{global_batch_size}; resume with the old number, or start anew with --overwrite"
        )
    return found, state


def _find_snapshot(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """Give the newest whole checkpoint, and the newer ones with what is wrong with them."""
    for left in [*folder.glob(".step_*.writing-*"), *folder.glob(".step_*.old-*")]:
        shutil.rmtree(left, ignore_errors=True)
    faults: dict[str, str] = {}
    for path in sorted(folder.glob("step_*"), reverse=True):
        fault = _fault(path)
        if not fault:
            return path, faults
        faults[str(path)] = fault
    return None, faults


def _fault(path: Path) -> str:
    try:
        state = read_state(path)
    except (OSError, ValueError) as error:
        return f"state.json cannot be read ({error})"
    for name, size in state["files"].items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if (path / name).stat().st_size != size:
            return f"{name} has {(path / name).stat().st_size} bytes, should have {size}"
    return ""


def read_state(path: Path) -> dict[str, Any]:
    """Read the counters of a checkpoint."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return state


def load_trained(path: Path, model: nn.Module) -> None:
    """Fill the trained parameters and buffers of a bare model.

    Raises:
        DataError: The model trains other tensors than the checkpoint holds, or of other shapes.
    """
    state = load_weights(path / "trainable.safetensors")
    places: dict[str, Tensor] = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    saved = model.state_dict().keys()
    places.update({name: buffer for name, buffer in model.named_buffers() if name in saved})
    faults = [f"{name} is not in it" for name in places if name not in state]
    faults += [f"{name} is not trained now" for name in state if name not in places]
    faults += [
        f"{name} is {list(state[name].shape)} in it, {list(places[name].shape)} now"
        for name in places
        if name in state and state[name].shape != places[name].shape
    ]
    if faults:
        raise DataError(
            f"checkpoint {path} does not fit the model ({len(faults)} differences): {'; '.join(faults[:4])}.\n"
            "  Resume with the settings that it was trained with, or start anew with --overwrite"
        )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(state[name])


def load_optimizer(path: Path, accelerator: Accelerator, model: nn.Module, optimizer: Any) -> None:
    """Fill the prepared optimizer; under DeepSpeed the prepared model and optimizer together.

    Raises:
        ConfigError: The checkpoint was written with DeepSpeed and this run is without, or with another number of ranks.
        DataError: The file is damaged.
    """
    state = read_state(path)
    sharded = accelerator.distributed_type == DistributedType.DEEPSPEED
    if sharded != state["deepspeed"] or (sharded and state["ranks"] != accelerator.num_processes):
        written = f"{state['ranks']} ranks and {'' if state['deepspeed'] else 'no '}DeepSpeed"
        raise ConfigError(
            f"checkpoint {path} was written with {written}, this run has {accelerator.num_processes}; resume it as it was started"
        )
    if sharded:
        names = [name for name, parameter in accelerator.unwrap_model(model).named_parameters() if parameter.requires_grad]
        if names != state["trained"]:
            changed = sorted(set(names) ^ set(state["trained"]))
            raise DataError(f"checkpoint {path} holds other trained tensors than the model has: {', '.join(changed[:4])}")
        # Not strict: frozen tensors were left out, and the list of names above is what strictness would check.
        loaded, _ = model.load_checkpoint(str(path), tag="deepspeed", load_module_strict=False)  # type: ignore[operator]
        if loaded is None:
            raise DataError(f"DeepSpeed cannot load checkpoint {path}")
        return
    content = load_plain(path / "optimizer.pt")
    optimizer.load_state_dict(content["optimizer"])
    if accelerator.scaler is not None and content["scaler"] is not None:
        accelerator.scaler.load_state_dict(content["scaler"])


def load_plain(path: Path) -> Any:
    """Read a torch file of plain data.

    Raises:
        DataError: It is damaged or holds code.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError) as error:
        raise DataError(f"{path} is damaged: {str(error).splitlines()[0]}") from error
