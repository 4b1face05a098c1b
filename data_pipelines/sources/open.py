"""Opens a source by its format."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from data_pipelines.sources.base import Source, SourceFormat, SourceOptions
from data_pipelines.sources.folder import FolderSource
from data_pipelines.sources.jsonl import JsonlSource
from data_pipelines.sources.llamafactory import LlamaFactorySource
from data_pipelines.sources.ms_swift import MsSwiftSource


def _hf_datasets(options: SourceOptions) -> Source:
    # Late: the library takes a second to import.
    from data_pipelines.sources.hf_datasets import HfDatasetsSource

    return HfDatasetsSource(options)


OPENERS: dict[SourceFormat, Callable[[SourceOptions], Source]] = {
    SourceFormat.jsonl: JsonlSource,
    SourceFormat.llamafactory: LlamaFactorySource,
    SourceFormat.ms_swift: MsSwiftSource,
    SourceFormat.hf_datasets: _hf_datasets,
    SourceFormat.folder: FolderSource,
}


@lru_cache(maxsize=1)
def open_source(options: SourceOptions) -> Source:
    """Return the source; a process opens each once.

    Raises:
        ConfigError: an option that the source cannot use.
        DataError: `corrupt_json` where a list cannot be read at all.
        FileNotFoundError: there is nothing at the path.
    """
    return OPENERS[options.format](options)
