"""From the classes of a manifest to the two classes a model tells apart."""

from umtrain.data.manifest import Manifest, Slide, Volume
from umtrain.data.table import listed, near_hint
from umtrain.errors import ConfigError, ManifestError

LabelledManifest = Manifest[Slide] | Manifest[Volume]

# Words for "nothing found": where one of two classes is called so, the other is the positive one.
_NEGATIVE_WORDS = frozenset(
    ("0", "negative", "neg", "normal", "benign", "healthy", "control", "no", "none", "false")
)


def positive_class(manifest: LabelledManifest, positive: str | None) -> str:
    """Return the class that counts as positive: the given one, or one of two by their names.

    Of two, it is the one beside a class called normal, benign, negative, 0 or the like, else the
    last in order.

    Raises ManifestError if the train split has fewer than two classes, ConfigError if
    `positive` is no class, or is not given where there are more than two.
    """
    classes = manifest.classes
    if positive is not None and positive not in classes:
        raise ConfigError(
            f"dataset.positive={positive} is no class of {manifest.path}, whose classes are "
            f"{listed(classes)}; {near_hint(positive, classes) or 'choose one of them'}"
        )
    if positive is None and len(classes) > 2:
        raise ConfigError(
            f"{manifest.path} has {len(classes)} classes ({listed(classes)}) and a model tells "
            "two apart; say which one against the rest with dataset.positive=CLASS"
        )
    chosen = positive or _by_name(classes)
    _check_train_split(manifest, chosen)
    return chosen


def _by_name(classes: tuple[str, ...]) -> str:
    findings = [name for name in classes if name.strip().lower() not in _NEGATIVE_WORDS]
    return (findings or classes or ("",))[-1]


def binary_labels(manifest: LabelledManifest, positive: str | None = None) -> dict[str, int]:
    """Return 1 for the positive class and 0 for every other; raises as `positive_class` does."""
    chosen = positive_class(manifest, positive)
    return {label: int(label == chosen) for label in manifest.classes}


def _check_train_split(manifest: LabelledManifest, positive: str) -> None:
    """Raise ManifestError unless both sides of the question occur in the train split."""
    in_train = sorted({record.label for record in manifest.split("train")})
    if positive not in in_train or len(in_train) < 2:
        raise ManifestError(
            f"{manifest.path}: the train split has {listed(in_train) or 'no rows'}, expected "
            f"{positive or 'a positive class'} and at least one other class; "
            "add train rows of the class that is missing"
        )
