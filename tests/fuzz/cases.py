"""What hypothesis draws: words of the command line, and rows of data files.

No case reaches a network, writes outside of its folder or asks for gigabytes.
"""

from functools import cache

import yaml
from hypothesis import strategies as st

from loralab.config.places import data_root

GROUPS = ("adapter", "quantization", "optimizer", "schedule", "trainer", "callbacks", "memory", "plan", "data", "model")
SKIPPED = {  # options that need a network, gigabytes, or minutes
    "model": ("hf", "random", "tiny"),
    "data": ("docstrings", "files", "chat"),
    "logger": ("none", "csv"),
}
LARGE = ("model.config", "memory.ballast", "memory.spiky_length", "data.generate_rows", "data.generation")
UNSAFE = ("hydra.", "logger.", "memory.snapshot")


@cache
def options(group):
    names = sorted(path.stem for path in (data_root() / "conf" / group).glob("*.yaml"))
    return [name for name in names if name in SKIPPED.get(group, names)]


@cache
def keys(group, option):
    """The dotted keys of an option's yaml."""
    content = yaml.safe_load((data_root() / "conf" / group / f"{option}.yaml").read_text()) or {}
    return tuple(flat(group, content))


def flat(prefix, content):
    for key, value in content.items():
        name = f"{prefix}.{key}"
        yield name
        if isinstance(value, dict):
            yield from flat(name, value)


ALL = sorted({key for group in GROUPS for option in options(group) for key in keys(group, option)})
ODD = [
    *("", "null", "true", "False", "nan", "-inf", "1e400", "-0.0", "1e-400", "0x10", "1_0", "0", "-1", "1.5", "9" * 30),
    *(
        "9" * 5000,
        "2147483648",
        "'",
        '"',
        "[",
        "]",
        "{}",
        "[]",
        "[[]]",
        "[[[1]]]",
        "{a: {b: [1, {c: null}]}}",
        "[1,,2]",
    ),
    *("[nan]", "[null]", "{'': 1}", "{1: 2}", "[a b]", "a b", " ", "\t", "a\nb", "\\", "a\\'b", "=", "==", "a=b", ","),
    *("1,2", "range(3)", "choice(1,2)", "interval(0,1)", "glob(*)", "shuffle(1,2)", "sort(2,1)", "int(a)", "str(1)"),
    *("${seed}", "${nowhere}", "${adapter.r}", "${adapter}", "${", "${oc.env:NOWHERE}", "${oc.decode:'['}", "???"),
    *(
        "${loralab.mul:a,b}",
        "${loralab.steps:x}",
        "${loralab.rank_for:0}",
        "${hydra:runtime.cwd}",
        "{q}",
        "{",
        "}",
        "{q!r}",
    ),
    *("{q:>99}", "{0}", "{}{}", "{q.a}", "{q[0]}", "%s", "/", ".", "~", "/dev/null", "/nonexistent/x", "x" * 300, "💥"),
    *(
        "\udcff",
        "\x00",
        "\u202e",
        "ﬀ",
        "İ",
        "lora",
        "nf4",
        "auto",
        "cpu",
        "os.system",
        "builtins.eval",
        "torch.nn.Linear",
    ),
]
TEXTS = st.one_of(
    st.sampled_from(ODD),
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(repr),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 10**20), st.floats(), st.sampled_from(ODD)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=2)
        ),
        max_leaves=6,
    ).map(lambda value: yaml.safe_dump(value, default_flow_style=True, width=10**9).strip().removesuffix("\n...")),
)


@st.composite
def key(draw, chosen):
    """A key that there is, mostly of the chosen options, or one that is nearly one."""
    own = [name for group, option in chosen.items() for name in keys(group, option)]
    name = draw(
        st.sampled_from(own or ALL) if own and draw(st.booleans()) else st.sampled_from([*ALL, "seed", "metric"])
    )
    kind = draw(st.integers(0, 19))
    if kind == 0:
        return draw(st.text(max_size=8))
    if kind == 1:
        place = draw(st.integers(0, len(name)))
        return name[:place] + draw(st.text(max_size=2)) + name[place + 1 :]
    return draw(st.sampled_from(["+", "++", "~"])) + name if kind < 5 else name


@st.composite
def words(draw):
    """Of one command: groups and settings."""
    groups = draw(st.lists(st.sampled_from(GROUPS), max_size=2, unique=True))
    chosen = {group: draw(st.sampled_from(options(group))) for group in groups}
    drawn = [f"{group}={option}" for group, option in chosen.items()]
    for _ in range(draw(st.integers(1, 3))):
        name, value = draw(key(chosen)), draw(TEXTS)
        word = name if name.startswith("~") and draw(st.booleans()) else f"{name}={value}"
        bare = name.lstrip("+~")
        if not bare.startswith(UNSAFE) and not (bare.startswith(LARGE) and len(value) > 2):
            drawn.append(word)
    return drawn


BYTES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [b"", b"\n", b"\r\n", b"\xef\xbb\xbf", b"\x00", b"\xff\xfe{\x00", b"[" * 10000, b'{"q":' * 5000, b"null"]
    ),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["\ud800", "\x00", "9" * 5000, "é" * 500, "\r", "\n", "\u2028", "</s>", "{q}", "", " "]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["q", "a"]), inner, max_size=2)
    ),
    max_leaves=5,
)
ROWS = st.one_of(
    st.fixed_dictionaries({"q": VALUES, "a": VALUES}),
    st.fixed_dictionaries({"q": st.text(max_size=8), "a": SCALARS}),
    st.dictionaries(st.sampled_from(["q", "a", "b", "", "q.a"]), SCALARS, max_size=3),
    VALUES,
)
ENDS = st.sampled_from(["\n", "\r\n", "\r", "", "\n\n", " \n"])
