"""Site-packages with what some requirements bring, and nothing else that happens to be installed here."""

from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def link_packages(requirements: Iterable[str], folder: Path) -> Path:
    """Fill a new `folder` with links to this environment's packages: those required, and what they require.

    A `python -S` with it as its PYTHONPATH, or a virtual environment with it in a .pth file, sees no others.
    """
    folder.mkdir()
    wanted, done = [(Requirement(text), {""}) for text in requirements], set()
    while wanted:
        requirement, extras = wanted.pop()
        if requirement.marker and not any(requirement.marker.evaluate({"extra": name}) for name in extras):
            continue
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in done:
            continue
        done.add(key)
        package = metadata.distribution(requirement.name)
        assert requirement.specifier.contains(package.version, prereleases=True), (
            requirement,
            package.version,
        )
        for top in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(package.locate_file(top))))
        wanted += [(Requirement(text), {"", *requirement.extras}) for text in package.requires or ()]
    return folder
