"""CITATION.cff says of this package what the package says of itself."""

import configparser
from pathlib import Path

import pytest
import yaml

import ebjax

ROOT = Path(__file__).parent.parent
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


@pytest.fixture
def metadata():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser["metadata"]


def test_version_is_that_of_the_package(metadata):
    assert CITATION["version"] == ebjax.__version__ == metadata["version"]


def test_license_is_that_of_the_package(metadata):
    assert CITATION["license"] == metadata["license"]


def test_fields_that_the_format_requires():
    assert CITATION["cff-version"] == "1.2.0"
    assert all(CITATION[name] for name in ("message", "title", "authors", "abstract"))
    for author in CITATION["authors"]:  # an entity has a name, a person given and family names
        assert "name" in author or {"given-names", "family-names"} <= author.keys()
    assert len(set(CITATION["keywords"])) == len(CITATION["keywords"])
