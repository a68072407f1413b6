"""What the commands about a trained net do, once its run and its outputs have been checked."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

from trainer.config import Config
from trainer.inference import export as export_
from trainer.inference import neighbours as neighbours_
from trainer.inference import predict as predict_
from trainer.inference.features import check_features_file, write_features
from trainer.inference.import_weights import import_weights
from trainer.inference.trained_net import FeatureRow, Prediction, TrainedNet
from trainer.parallel.launch import choose_device
from twotower import terminal, verbosity

LEFT_OUT = 3  # exit status where some images could not be used


def _net(arguments: argparse.Namespace, *, views: str = "center") -> TrainedNet:
    device = choose_device(arguments.device)
    return TrainedNet(arguments.run, arguments.data, device=device, views=views, which=arguments.checkpoint)


def _rows(net: TrainedNet, paths: list[Path], layer: str, *, images: bool) -> Iterator[FeatureRow]:
    """A layer's rows; those without values are a line on stderr each."""
    for row in net.feature_rows(paths, layer, images=images):
        predict_.print_error(row)
        yield row


def predict(arguments: argparse.Namespace) -> int:
    """Prints the likeliest classes of images; status 3 where some could not be used."""
    net = _net(arguments, views=arguments.views)
    results: list[Prediction] = []
    refused: list[Prediction] = []
    paths = predict_.find_images(arguments.images)
    pages = predict_.html_pages(arguments.html, arguments.run, refused) if arguments.html else None
    for result in net.predict(paths, top=arguments.top, images=pages is not None):
        results.append(dataclasses.replace(result, image=None))  # a page that is written needs it no more
        predict_.print_error(result)
        if result.error:
            refused.append(result)
        elif pages:
            pages.add(result)
        if arguments.json:
            predict_.print_json(result)
            if arguments.html is None and terminal.lost_output():
                break  # nobody reads the rest
    if not arguments.json:
        predict_.print_table(results)
    if pages:
        pages.close()
        verbosity.say_written(arguments.html)
    return LEFT_OUT if refused else 0


def features(arguments: argparse.Namespace) -> int:
    """Writes what a layer says about images and prints where; status 3 where some could not be used."""
    check_features_file(arguments.output)
    paths = predict_.find_images(arguments.images)
    rows = list(_rows(_net(arguments), paths, arguments.layer, images=False))
    write_features(arguments.output, rows, arguments.layer)
    print(arguments.output)
    return LEFT_OUT if any(row.error for row in rows) else 0


def neighbours(arguments: argparse.Namespace) -> int:
    """Prints which images are most alike to the net; status 3 where some could not be used."""
    asked, among = predict_.find_images(arguments.images), predict_.find_images(arguments.among or arguments.images)
    net, images = _net(arguments), arguments.html is not None
    rows = {row.path: row for row in _rows(net, list(dict.fromkeys([*asked, *among])), arguments.layer, images=images)}
    usable = {path: row for path, row in rows.items() if not row.error}
    found = neighbours_.find_neighbours(
        [usable[path] for path in asked if path in usable],
        [usable[path] for path in dict.fromkeys(among) if path in usable],
        arguments.count,
    )
    if arguments.json:
        neighbours_.print_json(found)
    else:
        neighbours_.print_table(found)
    if arguments.html:
        refused = [row for row in rows.values() if row.error]
        neighbours_.write_html(arguments.html, found, refused, arguments.run, arguments.layer)
        verbosity.say_written(arguments.html)
    return LEFT_OUT if len(usable) < len(rows) else 0


def export(arguments: argparse.Namespace) -> int:
    """Writes the net and prints where it is."""
    print(
        export_.export_run(
            arguments.run,
            arguments.output,
            data=arguments.data,
            which=arguments.checkpoint,
            preprocessing=not arguments.no_preprocessing,
        )
    )
    return 0


def import_(arguments: argparse.Namespace, config: Config | None) -> int:
    """Makes a run out of weights and prints its checkpoint."""
    folder = import_weights(
        arguments.weights, arguments.run, config=config, overrides=arguments.set, data=arguments.data
    )
    print(folder)
    return 0
