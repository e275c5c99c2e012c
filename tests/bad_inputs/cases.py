"""Bad inputs, and the line that a user must see beside each. One entry more is one case more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from making import (
    DEEP,
    Content,
    changed,
    checkpoint,
    edited,
    finetuned,
    link,
    parquet,
    pickled,
    removed,
    saved,
    sharded,
    tensors,
    truncated,
    words,
)


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        name: of the test.
        command: overrides, after those of a tiny study; `{here}` is the directory in which the files are made.
        line: what is printed after `error: `, its beginning at least; `...` stands for anything.
        files: what is made before, by name; see `making.make`.
        flags: of the command line, `-m` for a sweep.
        damage: is done to a store in which `stages=[finetune] finetune.steps=1` was run.
    """

    name: str
    command: Sequence[str]
    line: str
    files: Mapping[str, Content] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    damage: Callable[[Path], object] | None = None


# A teacher that is read from `{here}/m`.
CHECKPOINT = (
    "teacher.source={here}/m",
    "teacher.tokenizer=null",
    "teacher.family=null",
    "teacher.layers=null",
    "teacher.hidden=null",
    "teacher.heads=null",
    "teacher.intermediate=null",
)
CONFIG, WEIGHTS, TOKENIZER = "m/config.json", "m/model.safetensors", "m/tokenizer.json"
LAYER = "bert.encoder.layer.0.output.dense.weight"
SHARDS = "model-00001-of-00002.safetensors, model-00002-of-00002.safetensors"
PICKLE = "teacher.source: expected weights in safetensors, given a pickle in {here}/m ...writes safetensors"


def teacher(name: str, change: Mapping[str, Content], line: str, *more: str) -> Case:
    """A checkpoint of which a file is changed."""
    return Case(name, (*CHECKPOINT, *more), f"teacher.{line}", {"m": checkpoint, **change})


def config(key: str, value: object, expected: str) -> Case:
    """A field of a checkpoint's config.json."""
    line = f"source: {key} in {{here}}/{CONFIG}: expected {expected}...given "
    return teacher(f"config.json {key}={value}", {CONFIG: changed(**{key: value})}, line)


def artifact(name: str, change: Mapping[str, Content], line: str) -> Case:
    """An artifact of EdgeMIN of which a file is changed."""
    return Case(f"artifact: {name}", CHECKPOINT, f"teacher.source: ...{line}", {"m": saved, **change})


# A task of two sentences each, as CSV.
DATA: Mapping[str, Content] = {
    "d/train.csv": "text,label\none,x\ntwo,y\n",
    "d/validation.csv": "text,label\none,x\ntwo,y\n",
}
OWN = ("task=custom", "task.path={here}/d", "task.max_length=16")
ROWS = '{"text": "one", "label": "x"}\n{"text": "two", "label": "y"}\n'


def own(name: str, change: Mapping[str, Content], line: str, *more: str) -> Case:
    """Own data of which a file is changed."""
    return Case(f"data: {name}", (*OWN, *more), line, {**DATA, **change})


def jsonl(name: str, first: str | bytes, line: str, *more: str) -> Case:
    """Own data as JSONL with a first row."""
    start = first if isinstance(first, bytes) else first.encode()
    files: dict[str, Content] = {"d/train.jsonl": start + ROWS.encode(), "d/validation.jsonl": ROWS}
    return Case(f"jsonl: {name}", (*OWN, *more), line, files)


def setting(override: str, line: str, *more: str) -> Case:
    """A value that cannot be."""
    return Case(override, (override, *more), line)


CONFIGS = [
    *(config("num_attention_heads", value, "a whole number from 1 to ") for value in (0, -4, 10**30)),
    config("num_attention_heads", 3, "a divisor of the width 32"),
    *(config("num_attention_heads", value, "a whole number") for value in ("big", 1.5, None, [4], True)),
    *(config("hidden_size", value, "a whole number from 1 to 65536") for value in (0, -1, 10**9)),
    teacher("config.json hidden_size=33", {CONFIG: changed(hidden_size=33)}, "source: num_attention_heads in ...33"),
    *(config("num_hidden_layers", value, "a whole number from 1 to 1000") for value in (0, -1, 100_000)),
    *(config("vocab_size", value, "a whole number from 1 to") for value in (0, -1, 10**12)),
    *(config("intermediate_size", value, "a whole number from 1 to") for value in (0, -1, 10**12)),
    *(config("max_position_embeddings", value, "a whole number from 1 to") for value in (0, -1, 10**12)),
    config("type_vocab_size", -1, "a whole number from 1 to"),
    config("hidden_act", "nosuch", "an activation"),
    config("hidden_act", 5, "a string"),
    *(config("hidden_dropout_prob", value, "a number in [0, 1]") for value in (-1, 2, float("nan"))),
    config("layer_norm_eps", float("nan"), "a number above 0"),
    *(config("pad_token_id", value, "one of the 132 tokens") for value in (-1, 10**6)),
    config("is_decoder", True, "false"),
    config("output_attentions", True, "false"),
    config("chunk_size_feed_forward", 7, "0"),
    config("position_embedding_type", "relative_key", "absolute"),
    config("quantization_config", {"quant_method": "bitsandbytes"}, "weights that are not quantized"),
    *(config("id2label", value, "names numbered from 0") for value in ("x", [1], {"a": "b"}, {"0": "a", "2": "b"})),
    config("id2label", {"0": "\ud800", "1": "b"}, "printable names"),
    config("architectures", 5, "a list of names"),
    *(config("model_type", value, "an encoder (bert, ") for value in ("nosuch", "t5", 5, None, ["bert"])),
    teacher("config.json dtype", {CONFIG: changed(dtype="float99")}, "source: no model can be built from {here}/m/"),
    teacher("config.json empty", {CONFIG: ""}, "source: expected a checkpoint with a config.json, given {here}/m/"),
    teacher("config.json list", {CONFIG: "[]"}, "source: expected a checkpoint ... found a list"),
    teacher("config.json null", {CONFIG: "null"}, "source: expected a checkpoint ... found a NoneType"),
    teacher("config.json deep", {CONFIG: DEEP}, "source: expected a checkpoint ...(nested too deeply)"),
    teacher("config.json UTF-16", {CONFIG: "{}".encode("utf-16")}, "source: expected a checkpoint ... decode"),
    teacher("config.json gone", {CONFIG: removed}, "source: expected a checkpoint with a config.json"),
    teacher("fewer layers than weights", {CONFIG: changed(num_hidden_layers=2)}, "source: ...for the 2 layers"),
    teacher("more layers than weights", {CONFIG: changed(num_hidden_layers=4)}, "source: expected all weights"),
]

CHECKPOINTS = [
    teacher(
        "index: no such file",
        {WEIGHTS: sharded(lambda index: index["weight_map"].update({LAYER: "x"}))},
        f"source: weight_map in {{here}}/m/model.safetensors.index.json: expected files beside it ({SHARDS})",
    ),
    teacher(
        "index: outside",
        {WEIGHTS: sharded(lambda index: index["weight_map"].update({LAYER: "../x.safetensors"})), "x.safetensors": b""},
        "source: weight_map in ...: expected files beside it ... given '../x.safetensors'",
    ),
    teacher(
        "index: number",
        {WEIGHTS: sharded(lambda index: index["weight_map"].update({LAYER: 5}))},
        "source: weight_map in ... given '5'",
    ),
    teacher(
        "index: unknown tensor",
        {WEIGHTS: sharded(lambda index: index["weight_map"].update({"nosuch": "model-00001-of-00002.safetensors"}))},
        "source: weight_map in ... given nosuch",
    ),
    teacher(
        "index: tensor left out",
        {WEIGHTS: sharded(lambda index: index["weight_map"].pop(LAYER))},
        f"source: weight_map in ...: expected all tensors of the files, given none for {LAYER}",
    ),
    teacher(
        "index: list",
        {WEIGHTS: sharded(lambda index: index.update(weight_map=[1]))},
        "source: weight_map in ...: expected the file of each tensor",
    ),
    teacher(
        "index: empty object",
        {WEIGHTS: sharded(lambda index: index.clear())},
        "source: weight_map in ...: expected the file of each tensor",
    ),
    teacher(
        "index: deep",
        {WEIGHTS: sharded(), "m/model.safetensors.index.json": DEEP},
        "source: {here}/m/model.safetensors.index.json cannot be read (nested too deeply)",
    ),
    teacher(
        "weights: shape",
        {WEIGHTS: tensors(lambda held: held.update({LAYER: torch.zeros(3, 3)}))},
        f"source: expected weights in {{here}}/m of the shapes that its config.json says, [32, 48] for {LAYER}, "
        "given [3, 3]",
    ),
    teacher(
        "weights: one missing",
        {WEIGHTS: tensors(lambda held: held.pop(LAYER))},
        f"source: expected all weights of the encoder in {{here}}/m, given none for {LAYER}",
    ),
    teacher(
        "weights: nan",
        {WEIGHTS: tensors(lambda held: held[LAYER].fill_(float("nan")))},
        f"source: expected finite weights in {{here}}/m, given {LAYER}",
    ),
    teacher(
        "weights: integers",
        {WEIGHTS: tensors(lambda held: held.update({LAYER: held[LAYER].int()}))},
        f"source: expected weights in ... given integers for {LAYER}",
    ),
    teacher("weights: empty", {WEIGHTS: b""}, "source: the weights in {here}/m/model.safetensors cannot be read"),
    teacher("weights: truncated", {WEIGHTS: truncated}, "source: the weights in ... cannot be read"),
    teacher("weights: header of 2^64 bytes", {WEIGHTS: b"\xff" * 8 + b"{}"}, "source: the weights in ... too large"),
    teacher("weights: gone", {WEIGHTS: removed}, "source: the weights in {here}/m cannot be loaded"),
    teacher("weights: dangling link", {WEIGHTS: removed, "m/model.safetensors/": link("nowhere")}, "source: "),
    teacher("pickle: an object", {WEIGHTS: removed, "m/pytorch_model.bin": pickled({"a": Path("x")})}, PICKLE[8:]),
    teacher("pickle: a module", {WEIGHTS: removed, "m/pytorch_model.bin": pickled(torch.nn.Linear(2, 2))}, PICKLE[8:]),
    teacher(
        "pickle: a call", {WEIGHTS: removed, "m/pytorch_model.bin": b"\x80\x04cos\nsystem\n(S'echo'\ntR."}, PICKLE[8:]
    ),
    teacher("pickle: a list", {WEIGHTS: removed, "m/pytorch_model.bin": pickled([1])}, "source: the weights in "),
    teacher("pickle: empty", {WEIGHTS: removed, "m/pytorch_model.bin": b""}, "source: the weights in "),
    Case(
        "a student's pickle is refused before its teacher is trained",
        [word.replace("teacher", "student") for word in CHECKPOINT if "family" not in word],
        f"student{PICKLE[7:]}",
        {"m": checkpoint, WEIGHTS: removed, "m/pytorch_model.bin": pickled({"a": Path("x")})},
    ),
    Case("a file for a directory", ("teacher.source={here}/m",), "teacher.", {"m": "text"}),
]

TOKENIZERS = [
    teacher(
        "no tokenizer",
        {TOKENIZER: removed, "m/tokenizer_config.json": removed},
        "tokenizer: expected a tokenizer (tokenizer.json, vocab.txt ...) beside the weights of {here}/m, found none",
    ),
    teacher(
        "tokenizer: no words",
        {TOKENIZER: words(lambda word: None)},
        "tokenizer: expected a vocabulary with words in {here}/m",
    ),
    teacher(
        "tokenizer: foreign words",
        {TOKENIZER: words(lambda word: f"x{word}")},
        "tokenizer: expected one that knows words of toy, given one to which all words of its first 96 ",
    ),
    teacher(
        "tokenizer: more words than the weights embed",
        {TOKENIZER: edited(lambda content: content["model"]["vocab"].update(beyond=5000))},
        "tokenizer: expected at most the 132 tokens the weights embed, given one of 5001",
    ),
    *(
        teacher(f"tokenizer: {name}", {TOKENIZER: content}, "tokenizer: the tokenizer in {here}/m cannot be read")
        for name, content in {"empty": "", "object": "{}", "list": "[]", "deep": DEEP}.items()
    ),
    *(
        teacher(f"tokenizer_config.json: {name}", {"m/tokenizer_config.json": content}, "tokenizer: ")
        for name, content in {
            "list": "[]",
            "deep": DEEP,
            "number": changed(tokenizer_class=5),
            "padding": changed(pad_token=5),
            "length": changed(model_max_length="x"),
            "no length": changed(model_max_length=0),
            "inputs": changed(model_input_names=5),
        }.items()
    ),
    teacher(
        "tokenizer: no padding token",
        {"m/tokenizer_config.json": edited(lambda held: held.pop("pad_token"))},
        "tokenizer: expected a padding token in {here}/m",
    ),
]

ARTIFACTS = [
    artifact(name, {"m/structure.json": content}, line)
    for name, content, line in (
        ("structure list", "[]", "structure.json is damaged (expected an object, found a list)"),
        (
            "structure empty",
            "{}",
            "structure.json: expected an artifact of format 2, given format 1 of another version",
        ),
        ("structure without a family", changed(family=None), "structure.json: family: input should be a valid string"),
        (
            "a provider that nobody knows",
            changed(quantized={"provider": "os", "layers": {"x": {}}}),
            "structure.json: quantized.provider: ",
        ),
        ("structure deep", DEEP, "structure.json is damaged (nested too deeply)"),
        ("hidden of another type", changed(hidden="x"), "structure.json: hidden: input should be a valid integer"),
        ("hidden beyond all", changed(hidden=10**9), "structure.json: hidden: input should be less than"),
        ("hidden of another model", changed(hidden=16), "does not fit structure.json"),
        ("no layers", changed(layers=[]), "structure.json: layers: "),
        ("layers of numbers", changed(layers=[1, 2]), "structure.json: layers.0: "),
        ("no heads", edited(lambda held: held["layers"][0].update(heads=0)), "structure.json: layers.0.heads: "),
        (
            "heads of null",
            edited(lambda held: held["layers"][0].update(heads=None)),
            "structure.json: layers.0.heads: ",
        ),
        ("no head size", edited(lambda held: held["layers"][0].pop("head_size")), "structure.json: layers.0.head_size"),
        ("unknown key", changed(more=1), "structure.json: more: "),
        ("a key of no file", changed(max_tokens=9), "structure.json: max_tokens: expected no such key, given '9'"),
        ("negative rows", changed(positions=-1), "structure.json: positions: "),
        ("another family", changed(family="roberta"), "structure: expected family bert, given roberta"),
        ("quantized by no bits", edited(lambda held: held["quantized"].update(layers={LAYER[:-7]: {}})), "structure"),
        ("quantized of another type", changed(quantized=5), "structure.json: quantized: "),
        ("quantized nowhere", edited(lambda held: held["quantized"].update(layers={"x": {"bits": 8}})), "structure"),
    )
]
ARTIFACTS += [
    artifact("config of no heads", {CONFIG: changed(num_attention_heads=0)}, "num_attention_heads in "),
    artifact("weights truncated", {WEIGHTS: truncated}, "the weights in "),
    artifact(
        "weights short of a tensor",
        {WEIGHTS: tensors(lambda held: held.pop("classifier.bias"))},
        "model.safetensors does not fit structure.json (first difference: classifier.bias)",
    ),
    artifact(
        "integers for floats",
        {WEIGHTS: tensors(lambda held: held.update({"classifier.bias": held["classifier.bias"].int()}))},
        "model.safetensors does not fit structure.json",
    ),
    artifact("provenance deep", {"m/provenance.json": DEEP}, "expected a checkpoint with a provenance.json"),
    artifact("provenance list", {"m/provenance.json": "[]"}, "expected a checkpoint with a provenance.json"),
]

FILES = [
    jsonl(
        "half a character in a text", '{"text": "\\ud800", "label": "x"}\n', "task.text_columns: ... in row 1 of train"
    ),
    jsonl(
        "half a character in a label",
        '{"text": "a", "label": "\\ud800"}\n',
        "task.label_column: expected labels that can be written in UTF-8, given '\\ud800'",
    ),
    jsonl(
        "deep", f"{DEEP}\n", "task.path: expected a readable .jsonl file, given {here}/d/train.jsonl (nested too deep"
    ),
    jsonl("deep field", f'{{"text": {DEEP}, "label": "x"}}\n', "task.path: ...(nested too deeply)"),
    jsonl(
        "a list for a text", '{"text": ["a"], "label": "x"}\n', "task.text_columns: ...given a list in row 1 of train"
    ),
    jsonl("true for a text", '{"text": true, "label": "x"}\n', "task.text_columns: ...given a bool in row 1 of train"),
    jsonl("a list for a label", '{"text": "a", "label": ["x"]}\n', "task.label_column: ...given "),
    jsonl("a number beyond all digits", f'{{"text": "a", "label": {"9" * 5000}}}\n', "task.path: expected a readable"),
    jsonl("a list for a row", "[1]\n", "task.path: expected an object per row"),
    jsonl("zero bytes", b"\0\0", "task.path: expected a readable .jsonl file"),
    jsonl("another encoding", "caf\u00e9".encode("latin-1"), "task.path: expected a readable .jsonl file in UTF-8"),
    own(
        "a number too large",
        {"d/train.csv": "text,label\na,1e308\nb,1\n"},
        "task.label_column: expected finite numbers (task.kind=regression), given 1e308",
        "task.kind=regression",
    ),
    own(
        "nan", {"d/train.csv": "text,label\na,nan\nb,1\n"}, "task.label_column: expected finite", "task.kind=regression"
    ),
    own(
        "UTF-16", {"d/train.csv": "text,label\n".encode("utf-16")}, "task.path: expected a readable .csv file in UTF-8"
    ),
    own("empty file", {"d/train.csv": ""}, "task.train_split: expected a split with examples"),
    own("a column twice", {"d/train.csv": "text,text,label\na,b,x\n"}, "task.path: expected distinct column names"),
    own("a quote left open", {"d/train.csv": 'text,label\n"one,x\n'}, "task.path: ...unexpected end of data"),
    own("a cell too many", {"d/train.csv": "text,label\na,x,y\n"}, "task.path: expected 2 cells in row 1"),
    own(
        "label in validation alone",
        {"d/train.csv": "text\none\ntwo\n"},
        "task.label_column: expected a column of train",
    ),
    own("two formats", {"d/train.tsv": "text\tlabel\n"}, "task.path: expected one file for the split 'train'"),
    own("link to itself", {"d/validation.csv": link("validation.csv")}, "task.path: "),
    own("a device", {}, "task.path: expected an existing directory or file", "task.path=/dev/zero"),
    own("subset", {}, "task.subset: expected null for files of your own ({here}/d), given x", "task.subset=x"),
    own(
        "split outside", {}, "task.evaluation_splits: expected a name, without /", "task.evaluation_splits=[../d/train]"
    ),
    own("split outside to train on", {}, "task.train_split: expected a name, without /", "task.train_split=../d/train"),
    own("no metric", {}, "task.metrics: expected null or at least one metric", "task.metrics=[]"),
    *(
        Case(
            f"parquet: {name}",
            OWN,
            line,
            {"d/train.parquet": content, "d/validation.parquet": parquet(text=["one"], label=["x"])},
        )
        for name, content, line in (
            (
                "nested text",
                parquet(text=[{"a": 1}], label=["x"]),
                "task.text_columns: ...given a dict in row 1 of train",
            ),
            ("bytes", parquet(text=[b"a"], label=["x"]), "task.text_columns: ...given a bytes in row 1 of train"),
            ("nested label", parquet(text=["a", "b"], label=[{"l": 1}, {"l": 2}]), "task.label_column: ...given "),
            ("junk", b"PAR1junkPAR1", "task.path: expected a readable .parquet file"),
        )
    ),
]

NUMBERS = [
    *(
        setting(f"{key}=nan", f"{key}: expected ")
        for key in (
            "trainer.checkpoint_seconds",
            "finetune.learning_rate",
            "finetune.epochs",
            "finetune.warmup",
            "finetune.weight_decay",
            "finetune.gradient_clip",
            "prune.ratio",
            "task.holdout",
            "distill.task_weight",
        )
    ),
    *(
        setting(f"{key}=inf", f"{key}: expected a finite number, given inf")
        for key in (
            "trainer.checkpoint_seconds",
            "finetune.weight_decay",
            "finetune.gradient_clip",
            "finetune.learning_rate",
        )
    ),
    setting("task.regression=true", "task.regression: unknown key (say task.kind=regression, or task.kind=classif"),
    setting("+task.regression=false", "task.regression: unknown key (say task.kind=regression, or task.kind=classif"),
    setting("task.kind=ranking", "task.kind: expected one of classification, regression"),
    setting("task.kind=true", "task.kind: expected a string, given True"),
    setting("distill.relations.qq=nan", "distill.relations: expected a finite number, given nan"),
    setting(
        "finetune.steps=1000000000000000000000000000000", "finetune.steps: expected a whole number of at most 64 bits"
    ),
    setting("seed=-1", "seed: expected a whole number of at least 0, given -1"),
    setting("teacher.seed=-5", "teacher.seed: expected a whole number of at least 0, given -5"),
    setting("student.seed=-5", "student.seed: expected a whole number of at least 0, given -5"),
    setting("task.seed=-5", "task.seed: expected a whole number of at least 0, given -5"),
    setting("student.layers=100000", "student.layers: expected a whole number up to 1000, given 100000"),
    setting("student.hidden=1000000000", "student.hidden: expected a whole number from 1 to 65536 or null, given "),
    setting(
        "student.hidden=65536",
        "student.hidden: expected weights that fit into this machine's memory of ",
        "student.layers=1000",
        "student.intermediate=262144",
    ),
    setting("student.vocabulary=1000000000", "student.vocabulary: expected a whole number from 1 to "),
    setting("evaluate.margin=1", "evaluate.margin: expected a share in (0, 1), given 1"),
    setting("trainer.threads=100000", "trainer.threads: expected a whole number from 1 to 1024 or null, given 100000"),
    setting("task.max_train_examples=1000000000", "task.max_train_examples: expected at most 200000 examples"),
    setting("task.max_length=100000", "task.max_length: expected at most 128, what the teacher takes, given 100000"),
]

MEASURES = "measure: expected one of default, grid, none, onnxruntime, openvino, quick, runtimes"
SETTINGS = [
    setting("measure=5", f"{MEASURES}, given 5"),
    setting("measure=[1]", f"{MEASURES}, given [1]"),
    setting(
        "measure.runtimes=[tflite]",
        "measure.runtimes: expected torch, torch_compiled, onnxruntime, openvino, openvino_bf16, given 'tflite'",
        "measure=default",
    ),
    setting(
        "distill=rkd_published",
        "distill: expected a method with a published budget (minilmv2_published, mobilebert_published, pkd_published, "
        "tinybert_published), given rkd_published, which has none",
    ),
    setting("order=5", "order: expected one of assistant, "),
    setting("task=null", "task: expected one of custom, "),
    Case(
        "a choice that is no name in a sweep",
        ("logger=csv,5",),
        "...logger: expected one of csv, wandb, given 5",
        flags=("-m",),
    ),
    setting("study='a\udcff'", "study: expected a name of at most 100 printable characters, given 'a\\udcff'"),
    setting("task.name='a\udcff'", "task.name: expected text that can be written in UTF-8, given 'a\\udcff'"),
    setting("task.labels=[x,'\udcff']", "task.labels: expected text that can be written in UTF-8, given '\\udcff'"),
    setting("stages=[finetune,5]", "stages: expected a list, each entry a string...given ['finetune', 5]"),
    setting("order.rows=5", "order.rows: expected a list, "),
    setting("distill.corpus_weights=[1,2]", "distill.corpus_weights: expected null without a corpus, given [1, 2]"),
    Case(
        "weights that do not match the corpora",
        ["distill.corpus=[/a,/b]", "distill.corpus_weights=[1]", "distill.epochs=null"],
        "distill.corpus_weights: expected 2 numbers above 0, one for each corpus, given [1]",
    ),
    setting("distill.corpus=/nosuch", "distill.corpus: expected an existing directory or file, or a Hub id"),
    setting("student.family=gpt2", "student.family: expected one of bert, "),
    setting("teacher.source=''", "teacher."),
]

STORES = [
    Case(
        "store: weights truncated",
        ("stages=[finetune]", "finetune.steps=1"),
        "artifact ...corrupted, model.safetensors differs from its checksum",
        damage=lambda store: truncated(finetuned(store) / "model.safetensors"),
    ),
    Case(
        "store: a manifest of nothing",
        ("stages=[finetune]", "finetune.steps=1"),
        "artifact ...manifest.json",
        damage=lambda store: (finetuned(store) / "manifest.json").write_text("{}"),
    ),
    Case(
        "store: a manifest that is no object",
        ("stages=[finetune]", "finetune.steps=1"),
        "artifact ...manifest.json",
        damage=lambda store: (finetuned(store) / "manifest.json").write_text("[]"),
    ),
]

# What the planning of a whole launch, the names of things and the store refuse.
LAUNCHES = [
    *(
        setting(f"{key}={value}", f"{key}: ")
        for key in ("task.name", "study")
        for value in ("a/../../b", "..", "/tmp/x", "''")
    ),
    setting("task.name=a/b", "task.name: "),
    setting("paths.store=''", "paths.store: "),
    setting("paths.outputs=''", "paths.outputs: "),
    setting("published=/etc/passwd", "published: "),
    setting("published=5", "published: "),
    Case("published deep", ("published={here}/published.yaml",), "published: ", {"published.yaml": DEEP}),
    setting("+anything=1", "anything: "),
    setting("finetune._target_=edgemin.study.roots.Root", "finetune._target_: "),
    setting("task._target_=pathlib.Path", "task._target_: "),
    setting("trainer._target_=builtins.dict", "trainer._target_: "),
    setting("logger._target_=builtins.str", "logger._target_: "),
    Case(
        "a sweep whose configuration is asked for",
        ("--cfg", "job"),
        "Only one of --run, --multirun, --cfg...",
        flags=("-m",),
    ),
    Case(
        "a ratio out of range in a sweep", ("prune.ratio=0.2,2",), "...prune.ratio: expected ...given 2", flags=("-m",)
    ),
    Case(
        "an unknown criterion in a sweep",
        ("prune.criterion=taylor,nosuch",),
        "...prune.criterion: expected one of gradient_norm, taylor, ...given 'nosuch'",
        flags=("-m",),
    ),
    setting("prune=heads_taylor", "prune: expected one of ffn, heads, ...given heads_taylor"),
    own("semicolons", {"d/train.csv": "text;label\none;x\ntwo;y\n"}, "task."),
    own("numbers with a fraction for classes", {"d/train.csv": "text,label\na,0.5\nb,1.7\n"}, "task.label_column: "),
]


def pruning(what: str, line: str, *more: str) -> Case:
    """A pruning that cannot be: what it removes, and its settings."""
    return Case(" ".join(("pruning:", what, *more)), (*([f"prune={what}"] if what else []), *more), line)


VOCAB, ALL_LAYERS = "+prune@vocab=vocab", "prune.scope=global"
PRUNINGS = [
    pruning("heads", "prune.ratio: expected a share in [0, 1), given 1", "prune.ratio=1"),
    *(
        pruning(what, f"prune.ratio: expected one that leaves 1 of the {units} in all 2 layers, given 0.99 of ", *more)
        for what, units, *more in (
            ("heads", "heads", "prune.ratio=0.99", ALL_LAYERS),
            ("ffn", "FFN units", "prune.ratio=0.99", ALL_LAYERS, "prune.multiple=1"),
        )
    ),
    pruning(
        "heads_ffn",
        "prune.ffn_ratio: expected one that leaves 1 of the FFN units in all 2 layers, given 0.99 of 48",
        *("prune.ffn_ratio=0.99", ALL_LAYERS),
    ),
    pruning(
        "layers", "prune.scope: expected global for layers, which are ranked together, given layer", "prune.scope=layer"
    ),
    pruning("heads", "prune.ffn_ratio: expected null but for heads_ffn, given 0.3 for heads", "prune.ffn_ratio=0.3"),
    pruning("heads", "prune.multiple: expected null for heads, ", "prune.multiple=4"),
    *(
        pruning(what, f"prune.criterion: expected one of ...for {of}, given '{name}'", f"prune.criterion={name}")
        for what, of, name in (
            ("layers", "layers", "ziplm"),
            ("layers", "layers", "kwon"),
            ("layers", "layers", "magnitude"),
            ("hidden", "hidden", "ziplm"),
            ("hidden", "hidden", "gradient_norm"),
        )
    ),
    pruning(
        "heads",
        "prune.importance: expected calibration for the criterion ziplm, which solves for weights on fixed examples",
        *("prune.criterion=ziplm", "prune.importance=training"),
    ),
    *(
        pruning(what, f"prune.{key}: cannot be cut for mobilebert, whose {why}", "student.family=mobilebert")
        for what, key, why in (
            ("ffn", "ffn", "layers stack 4 feed-forward networks"),
            ("heads_ffn", "ffn", "layers stack 4 feed-forward networks"),
            ("hidden", "hidden", "feature maps of 16 units are tied by bottlenecks to another width"),
        )
    ),
    *(
        pruning(what, line, "stages=[finetune,quantize,prune]", "quantize=static", *more)
        for what, line, *more in (
            ("hidden", "prune.hidden: expected a model in full precision, "),
            ("ffn", "prune.criterion: expected one that leaves a quantized ...", "prune.criterion=kwon"),
        )
    ),
    pruning("ffn", "prune.corpus: expected null without a teacher, given text", "prune.corpus=text"),
    *(
        pruning(what, f"prune.target.{line}", *(f"prune.target.{word}" for word in words))
        for what, line, *words in (
            ("ffn", "measure: expected one of value, factor and factors beside it, given none", "measure=macs"),
            ("ffn", "measure: expected latency_ms, size_mib or macs beside factor, given null", "factor=0.5"),
            ("ffn", "factor: expected at least ...FFN units can reach, given 0.01", "measure=macs", "factor=0.01"),
            ("layers", "value: expected at least ...can reach, given 1", "measure=macs", "value=1.0"),
            ("hidden", "measure: expected size_mib or macs for hidden units", "measure=latency_ms", "factor=0.5"),
            (
                "ffn",
                "runtime: expected torch, ...given 'fast'",
                "measure=latency_ms",
                "factor=0.5",
                "runtime=fast",
            ),
            ("ffn", "table: expected a file latencies.json ", "measure=latency_ms", "factor=0.5", "table=none.json"),
            ("ffn", "factors: expected each number once", "measure=macs", "factors=[0.9,0.9]"),
        )
    ),
    pruning("ffn", "prune.teacher: expected one of teacher, ...given 'nobody'", "prune.teacher=nobody"),
    pruning(
        "ffn",
        "stages: expected only stages that need no data with task=none, given prune",
        *("task=none", "teacher.stages=[]", "stages=[prune]"),
    ),
    Case(
        "pruning: no split to rank units on",
        (*OWN, "prune=ffn", "stages=[finetune,prune]"),
        "task.path: expected a file for the split 'train'",
        {"d/validation.csv": DATA["d/validation.csv"]},
    ),
    pruning(
        "",
        "distill.teacher: expected one that reads the student's tokens, as it is compared token by token, given ",
        *(VOCAB, "stages=[finetune,vocab,distill]"),
    ),
    *(
        pruning("", f"{what}.{line}", f"+prune@{what}={what}", f"stages=[finetune,{what}]", setting.format(what))
        for what in ("joint", "movement")
        for line, setting in (
            ("sparsity: expected a share in [0, 1), given 1", "{}.sparsity=1"),
            ("sparsity: expected ...given 0.99", "{}.sparsity=0.99"),
            ("mask_epochs: expected either mask_epochs or mask_steps, given mask_epochs=6", "{}.mask_steps=3"),
            ("hidden: cannot be cut for mobilebert, whose", "student.family=mobilebert"),
        )
    ),
    pruning("", "vocab.min_count: expected ", VOCAB, "vocab.min_count=0", "stages=[finetune,vocab]"),
]

CASES = [*CONFIGS, *CHECKPOINTS, *TOKENIZERS, *ARTIFACTS, *FILES, *NUMBERS, *SETTINGS, *LAUNCHES, *PRUNINGS, *STORES]
