"""What pyproject.toml cannot say: the packages of the wheel, and the README as an index shows it.

The packages are those of opensora_sp, and configs/ as opensora_sp.configs. Where pyproject.toml
looks for packages it cannot name one that lies elsewhere, and a list of all packages would forget
the next one. An index shows the README without the repository: a relative link would lead nowhere.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

# The public address of the repository, as https://HOST/OWNER/opensora_sp. It has none yet. With
# one, the package names it, and the README's links lead to the files of this version's tag.
REPOSITORY = ""

ROOT = Path(__file__).resolve().parent
RELATIVE = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:|#)([^)\s]+)\)")


def for_an_index(readme: str, version: str) -> str:
    """The README with absolute links; without an address, with the words of the links alone."""

    def absolute(link: re.Match[str]) -> str:
        picture, words, path = link.groups()
        if REPOSITORY:
            place = "raw" if picture else "blob"
            return f"{picture}[{words}]({REPOSITORY}/{place}/v{version}/{path})"
        return f"*{words}: {path}*" if picture else words

    return RELATIVE.sub(absolute, readme)


(version,) = re.findall(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M)

setup(
    packages=[*find_packages(include=["opensora_sp", "opensora_sp.*"]), "opensora_sp.configs"],
    package_dir={"opensora_sp.configs": "configs"},
    long_description=for_an_index((ROOT / "README.md").read_text("utf-8"), version),
    long_description_content_type="text/markdown",
    project_urls={
        "Repository": REPOSITORY,
        "Changelog": f"{REPOSITORY}/blob/v{version}/CHANGELOG.md",
    }
    if REPOSITORY
    else {},
)
