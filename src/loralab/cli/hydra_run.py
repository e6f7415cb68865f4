"""What ``train`` and ``sweep`` share: their words go to Hydra, and the report of what was a sweep is shown."""

import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from loralab.cli.arguments import Arguments
from loralab.errors import ConfigError

SHOWING = ("--cfg", "--info", "--hydra-help")  # flags with which Hydra shows something and runs nothing


def check_axes(overrides: list[str]) -> dict[str, str]:
    """{key: word} of the axes among ``overrides``. Raises ConfigError for one that a later word would quietly
    replace."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    from loralab.config.words import quoted

    parser, axes = OverridesParser.create(), dict[str, str]()
    for word in quoted(overrides):
        try:
            parsed = parser.parse_overrides([word])[0]
        except OverrideParseException:  # Hydra says what is wrong with it
            continue
        key = str(parsed.key_or_group)
        if key in axes:
            raise ConfigError(f"{axes[key]} and {word} contradict each other; valid: {key} once, with all its values")
        if parsed.is_sweep_override():
            axes[key] = word
    return axes


def run(arguments: Arguments, overrides: list[str], many: bool, shows: bool = True) -> int:
    """Hands over to Hydra and returns the exit code; of a sweep that ``shows`` its results the table is printed and the
    page written."""
    from loralab.cli.subspace import after_sweep
    from loralab.cli.terminal import show_place, show_report
    from loralab.config.places import searched
    from loralab.scheduling.session import Session

    _check_flags(arguments.hydra)
    flags = [word for word in arguments.hydra if word != "-m"]
    if "--shell-completion" in flags:
        from loralab.cli.completion import complete

        return complete(flags, overrides)
    if not set(SHOWING).isdisjoint(flags):
        with searched(arguments.config_dir):
            return _show(flags, overrides, many)
    if many:
        check_own_files(overrides, arguments.config_dir, arguments.config_name)
    resumes = arguments.resume is not None
    previews = many and arguments.preview
    session = Session(fresh=arguments.fresh, many=many, flags=flags, resumes=resumes, previews=previews)
    session.failed = arguments.failed
    code = session.run([*(["-m"] if many else []), *flags, *overrides])
    if session.previewed is not None:
        from loralab.cli.preview import text

        print(text(session.previewed))
        return 0
    if many and shows and session.folder is not None:
        from loralab.reporting import wandb_report

        after_sweep(session.folder)
        show_place(wandb_report.after_sweep(show_report(session.folder)))
    return code


def check_own_files(overrides: list[str], config_dir: str | None = None, config_name: str | None = None) -> None:
    """Raises ConfigError where files of the user's own make a configuration that no trial can run, as a key that does
    not exist does: before anything is written. The first and the last trial are tried; an option that is nowhere is
    refused in either."""
    from hydra.errors import MissingConfigException

    from loralab.cli.hydra_errors import translate
    from loralab.config.build import trial_spec
    from loralab.config.compose import compose
    from loralab.config.places import conf_folders, searched
    from loralab.config.sweep_files import chosen_by, own_files

    errors: list[BaseException] = []
    with searched(config_dir):
        chosen = chosen_by(overrides)
        elsewhere = any(word.startswith("hydra.searchpath") for word in overrides)
        if elsewhere or not (conf_folders() or (chosen and own_files({"sweeps": chosen}))):
            return
        for last in (False, True):
            words = [word for word in _one_trial(overrides, last) if not word.startswith("hydra")]
            try:
                trial_spec(compose(words, config_name or "train"), Path())
            except MissingConfigException:
                raise
            except Exception as error:
                errors.append(translate(error, overrides))
    if len(errors) == 2 and str(errors[0]) == str(errors[1]) and "HydraConfig was not set" not in str(errors[0]):
        raise errors[0]


def _check_flags(flags: list[str]) -> None:
    for flag, example in (("--package", "--cfg job --package adapter"), ("--resolve", "--cfg job --resolve")):
        if flag in flags and "--cfg" not in flags:
            raise ConfigError(f"{flag} says how --cfg shows a configuration, and there is no --cfg; valid: {example}")


def _show(flags: list[str], overrides: list[str], many: bool) -> int:
    """What Hydra shows in place of a run; of many trials, the first."""
    from loralab.config.compose import shown
    from loralab.records.secrets import masked
    from loralab.scheduling.session import Session

    words, text = [*flags, *shown(_first_trial(overrides) if many else overrides)], StringIO()
    try:
        with redirect_stdout(text):
            return Session(fresh=False, many=False).run(words)
    except SystemExit as error:  # Hydra has shown its help, or said what it cannot show
        return 2 if error.code else 0
    finally:
        print(masked(text.getvalue()), end="")


def _first_trial(overrides: list[str]) -> list[str]:
    """The words of a sweep's first trial, for Hydra shows one configuration; stderr says which it is."""
    words, axes = _one_trial(overrides), check_axes(overrides)
    if chosen := [word for word in words if word.lstrip("+").partition("=")[0] in axes]:
        print(f"the first trial's: {' '.join(chosen)}", file=sys.stderr)
    return words


def _one_trial(overrides: list[str], last: bool = False) -> list[str]:
    """The words of a sweep's first or ``last`` trial."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from loralab.config.compose import compose
    from loralab.config.words import forced, quoted
    from loralab.scheduling.axes import at_ends
    from loralab.scheduling.rounds import of_axes

    words = at_ends(quoted(forced(overrides)))
    parsed = OverridesParser.create().parse_overrides(words)
    swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    if not swept:
        return overrides
    master = compose([str(override.input_line) for override in parsed if override.get_key_element() not in swept])
    task = [str(override.input_line) for override in parsed if not override.is_hydra_override()]
    hydra = [str(override.input_line) for override in parsed if override.is_hydra_override()]
    return [*hydra, *of_axes(master, task)[-1 if last else 0]]
