"""``loralab doctor``: what this machine can do, and the fix for what it cannot."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from loralab.cli.arguments import JSON, Arguments, Command
from loralab.errors import ConfigError

Finding = dict[str, str]  # name, status (ok, warn, fail), detail, fix
MARKS = {"ok": "ok", "warn": "warn", "fail": "FAIL"}
STYLES = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}


def run(arguments: Arguments) -> int:
    """Every check's finding."""
    if arguments.words:
        raise ConfigError(
            f"loralab doctor takes no settings, got {arguments.words[0]!r}; valid: loralab doctor [--json]"
        )
    findings = examine()
    print(json.dumps({"checks": findings}) if arguments.json else render(findings))
    return 0


def examine() -> list[Finding]:
    """Every check, in the order in which a run would meet them; a check that breaks is itself a finding."""
    checks: list[Callable[[], Finding]] = [
        *(python, torch_build, cuda, bitsandbytes, four_bit, paging, packages),
        *(shipped_base, wandb_mode, cache_folder, disk, git),
    ]
    findings = []
    for check in checks:
        try:
            findings.append(check())
        except Exception as error:
            findings.append(finding(check.__name__, "fail", f"{type(error).__name__}: {error}", "report this"))
    return findings


def render(findings: list[Finding]) -> str:
    """One line a check, its fix below where there is one."""
    from loralab.cli.terminal import table

    rows = []
    for check in findings:
        rows.append((MARKS[check["status"]], check["name"], check["detail"]))
        if check["fix"]:
            rows.append(("", "", f"-> {check['fix']}"))
    return table(rows, styles=STYLES)


def finding(name: str, status: str, detail: str, fix: str = "") -> Finding:
    return {"name": name, "status": status, "detail": detail, "fix": fix}


def python() -> Finding:
    fits = (3, 11) <= sys.version_info[:2] < (3, 14)
    return finding("python", "ok" if fits else "fail", sys.version.split()[0], "" if fits else "use 3.11 to 3.13")


def torch_build() -> Finding:
    import torch

    detail = f"{torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return finding("torch", "ok", detail)


def cuda() -> Finding:
    import torch

    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        detail = ", ".join(f"{card.name} ({card.total_memory / 2**30:.0f} GiB)" for card in cards)
        return finding("cuda", "ok", detail)
    built = torch.version.cuda is not None
    fix = "check the driver (nvidia-smi)" if built else "none needed on the CPU; else install a CUDA build of torch"
    return finding("cuda", "warn", "no device: runs train on the CPU", fix)


def bitsandbytes() -> Finding:
    from importlib.metadata import PackageNotFoundError, version

    try:
        installed = version("bitsandbytes")
    except PackageNotFoundError:
        return finding("bitsandbytes", "fail", "not installed", "pip install bitsandbytes; or quantization=none")
    from loralab.quantization.kernels import import_bitsandbytes

    try:
        import_bitsandbytes()
    except ImportError as error:
        fix = "a bitsandbytes that has one, or torch for a CUDA that it has one for; quantization=none needs neither"
        return finding("bitsandbytes", "fail", f"{installed}: {error}", fix)
    return finding("bitsandbytes", "ok", installed)


def four_bit() -> Finding:
    """The kernels' NF4 against our reference, at a width that is no multiple of the block size."""
    import torch

    from loralab.numerics import blockwise, codebooks
    from loralab.quantization.four_bit import FourBit

    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Linear(96, 64, bias=False)
    layer.weight.data.copy_(weight)
    dense = FourBit(quant_type="nf4", block_size=64).convert(layer).dense(torch.float32)  # type: ignore[operator]
    codes, absmax = blockwise.quantize_blockwise(weight, codebooks.nf4(), 64)
    expected = blockwise.dequantize_blockwise(codes, absmax, codebooks.nf4(), 64).view_as(weight)
    error = float((dense - expected).abs().max())
    status = "ok" if error < 1e-5 else "fail"
    return finding(
        "nf4", status, f"largest difference to the reference {error:.1e}", "" if status == "ok" else "report this"
    )


def paging() -> Finding:
    from loralab.optim.optimizers import cannot_page

    name = "paged optimizers"
    if reason := cannot_page():
        fix = "needs Linux without a virtual GPU, and a CUDA card from 2016 (Pascal) on"
        return finding(name, "warn", f"run unpaged here: {reason}", fix)
    return finding(name, "ok", "CUDA managed memory; tensors under 100,000 elements are never paged")


def packages() -> Finding:
    from importlib.metadata import version

    names = ("lightning", "transformers", "hydra-core", "wandb", "torchmetrics")
    return finding("packages", "ok", ", ".join(f"{name} {version(name)}" for name in names))


def shipped_base() -> Finding:
    """The files are there and the weights' index can be read; the tensors themselves are left alone."""
    from safetensors import SafetensorError, safe_open

    from loralab.models.pretrained import SHIPPED_FOLDER

    name, fix = "model=tiny", "install loralab again"
    files = [SHIPPED_FOLDER / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        return finding(name, "fail", f"{', '.join(missing)} missing in {SHIPPED_FOLDER}", fix)
    try:
        with safe_open(files[1], "pt") as stored:
            tensors = len(stored.keys())
    except SafetensorError as error:
        return finding(name, "fail", f"{files[1]} is damaged: {error}", fix)
    size = sum(path.stat().st_size for path in files)
    return finding(name, "ok", f"{tensors} tensors, {size / 1e6:.1f} MB in {SHIPPED_FOLDER}")


def wandb_mode() -> Finding:
    from loralab.records.wandb import Wandb, key_configured

    try:
        mode = Wandb().effective_mode
    except ConfigError as error:
        return finding("wandb", "fail", str(error), "unset WANDB_MODE, or set one of these")
    if mode == "disabled" or os.environ.get("WANDB_MODE"):
        return finding("wandb", "ok", f"the environment says {mode}: logger.mode=auto is that")
    if key_configured():
        return finding("wandb", "ok", "a key is configured: logger.mode=auto is online")
    return finding("wandb", "ok", "no key: logger.mode=auto logs offline", "wandb login, to go online")


def cache_folder() -> Finding:
    folder = Path(os.environ.get("LORALAB_CACHE") or Path.home() / ".cache" / "loralab")
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    if os.access(existing, os.W_OK):
        return finding("cache", "ok", str(folder))
    return finding("cache", "warn", f"{folder} cannot be written: data is mined anew each time", "set LORALAB_CACHE")


def disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    enough = free > 2
    return finding("disk", "ok" if enough else "warn", f"{free:.0f} GiB free here", "" if enough else "free some space")


def git() -> Finding:
    """Records name the commit they were made with."""
    if shutil.which("git"):
        return finding("git", "ok", "records hold the commit of the folder they are made in")
    return finding("git", "warn", "not found: records hold no commit", "install git")


DOCTOR = Command(
    name="doctor",
    summary="what this machine can do, and the fix for what it cannot",
    about="Checks Python, torch, CUDA, the 4-bit kernels against the reference, paging, the shipped base, W&B,\n"
    "the cache, the disk and git, and says how to mend what is missing.",
    usage="",
    examples={"loralab doctor": "a table", "loralab doctor --json": "for a script"},
    writes="nothing.",
    run=run,
    own_flags=(JSON,),
)
