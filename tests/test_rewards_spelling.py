"""The text form of rewards: what is parsed, written, and refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.spec import AGGREGATORS, Call, Term, aggregator, format_terms, parse


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("clip", [Term(Call("clip"))]),
        ("-clip", [Term(Call("clip"), -1.0)]),
        (
            "clip + 0.5*ocr(mode=strict)",
            [Term(Call("clip")), Term(Call("ocr", (), (("mode", "strict"),)), 0.5)],
        ),
        ("clip*2-1e-3*ocr", [Term(Call("clip"), 2.0), Term(Call("ocr"), -0.001)]),
        ("a - -0.5*b", [Term(Call("a")), Term(Call("b"), 0.5)]),
        ("a=clip(tiny)", [Term(Call("clip", ("tiny",)), 1.0, "a")]),
        ("a=2*clip + 3*b=clip", [Term(Call("clip"), 2.0, "a"), Term(Call("clip"), 3.0, "b")]),
        ("f(ViT-B-32/laion2b, x=-1)", [Term(Call("f", ("ViT-B-32/laion2b",), (("x", -1),)))]),
        ("f(1e-3, true, none, '1')", [Term(Call("f", (0.001, True, None, "1")))]),
        (r'f("a, b) \"c\"")', [Term(Call("f", ('a, b) "c"',)))]),
        ("0*mod.sub:Cls(3)", [Term(Call("mod.sub:Cls", (3,)), 0.0)]),
        ("f()", [Term(Call("f"))]),
        (
            "min(clip(tiny), 0.5*ocr(mode=strict))",
            [
                Term(
                    Call(
                        "min",
                        sums=(
                            (Term(Call("clip", ("tiny",))),),
                            (Term(Call("ocr", (), (("mode", "strict"),)), 0.5),),
                        ),
                    )
                )
            ],
        ),
        (
            "2*low=lcb(-clip + 0.3*ocr, b=par(a, ref=x.json), kappa=-1) - d",
            [
                Term(
                    Call(
                        "lcb",
                        (),
                        (("kappa", -1),),
                        (
                            (Term(Call("clip"), -1.0), Term(Call("ocr"), 0.3)),
                            (
                                Term(
                                    Call("par", (), (("ref", "x.json"),), ((Term(Call("a")),),)),
                                    1.0,
                                    "b",
                                ),
                            ),
                        ),
                    ),
                    2.0,
                    "low",
                ),
                Term(Call("d"), -1.0),
            ],
        ),
        ("min()", [Term(Call("min"))]),
        ("m:min(1)", [Term(Call("m:min", (1,)))]),
    ],
)
def test_parsing(text, terms):
    assert list(parse(text)) == terms
    assert parse(format_terms(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("clip+", "the end"),
        ("clip ocr", "between rewards"),
        ("2 clip", "after a weight"),
        ("2*3*clip", "name of a reward"),
        ("2*clip*3", "one weight"),
        ("clip(", "a value"),
        ("clip(a b)", "quote a value"),
        ("clip(a=1, a=2)", "only once"),
        ("clip(a=1, 2)", "after a named"),
        ("clip(1=2)", "a name instead of 1"),
        ("clip('open)", "a value"),
        ("__import__('os').system('x')", "between rewards"),
        ("min(a, b", "after a part of min"),
        ("min(a b)", "after a part of min"),
        ("min(a, b))", "between rewards"),
        ("min(a, b,)", "name of a reward"),
        ("min(a, 0.3)", "a reward, or name=value"),
        ("min(a, true)", "a reward, or name=value"),
        ("lcb(a, b, kapa=1)", "lcb has no argument 'kapa'; did you mean 'kappa'"),
        ("lcb(a, b, beta=1)", r"lcb has no argument 'beta'; it takes \['kappa'\]"),
        ("lcb(a, 2*kappa=b)", "lcb has no argument 'kappa'; did you mean 'kappa'"),
        ("lcb(a, kappa=1, b)", "come last"),
        ("lcb(a, b, kappa=1, kappa=2)", "only once"),
        ("calibrated(a, fil=a.json)", "did you mean 'file'"),
        ("lcbb(a + b, c)", "did you mean 'lcb'"),
    ],
)
def test_bad_specs_say_what_was_expected_where(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


VALUES = st.one_of(
    st.text(max_size=8),
    st.integers(-1000, 1000),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False, allow_infinity=False),
)


NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,6}", fullmatch=True).filter(
    lambda name: name not in AGGREGATORS
)


def named(values):
    return st.dictionaries(NAMES, values, max_size=2).map(lambda found: tuple(found.items()))


CALLS = st.builds(
    Call,
    NAMES,
    st.lists(VALUES, max_size=2).map(tuple),
    named(VALUES),
)


WEIGHTS = st.floats(-1e6, 1e6).map(lambda weight: weight + 0.0)  # no negative zero


def aggregates(calls):
    # an alias inside an aggregator must not look like one of its options
    aliases = st.one_of(st.just(""), NAMES.map(lambda name: f"own__{name}"))
    sums = st.lists(st.builds(Term, calls, WEIGHTS, aliases), min_size=1, max_size=3).map(tuple)

    def of(name):
        options = {key: VALUES for key in aggregator(name)[1]}
        return st.builds(
            Call,
            st.just(name),
            st.just(()),
            st.fixed_dictionaries({}, optional=options).map(lambda found: tuple(found.items())),
            st.lists(sums, max_size=3).map(tuple),
        )

    return st.sampled_from(sorted(AGGREGATORS)).flatmap(of)


NESTED = st.recursive(CALLS, aggregates, max_leaves=6)


TERMS = st.lists(
    st.builds(Term, NESTED, WEIGHTS, st.one_of(st.just(""), NAMES)), min_size=1, max_size=4
)


@given(TERMS)
def test_writing_and_reading_give_back_the_same_terms(terms):
    text = format_terms(tuple(terms))
    found = parse(text)
    assert found == tuple(terms)
    kinds = [[type(v) for v in term.call.args] for term in found]
    assert kinds == [[type(v) for v in term.call.args] for term in terms]
