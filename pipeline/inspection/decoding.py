"""Decodes a whole data set with DALI's reader and decoder, so that no training run is the first to."""

from pathlib import Path

from pipeline.inspection.verify import Problem, read_samples
from pipeline.manifest import Manifest
from pipeline.preparation.decoder_check import dali_accepts


def undecodable(folder: Path, manifest: Manifest) -> list[Problem]:
    """The samples whose picture DALI's decoder does not take, by shard and key."""
    problems = []
    for split in manifest.splits.values():
        for shard in split.shards:
            with (folder / shard.name).open("rb") as file:
                for sample in read_samples(folder / shard.name):
                    picture = sample.members[0]
                    file.seek(picture.offset)
                    if not dali_accepts(file.read(picture.size)):
                        problems.append(Problem(shard.name, f"DALI cannot decode sample {sample.key}"))
    return problems
