"""train: the supernet of a run."""

from __future__ import annotations

from vitnas.exporting.networks import load_network
from vitnas.records import SamplerSummary, Spent, TrainedSupernet
from vitnas.sample import Focus
from vitnas.stages.sampler import RunSampler, summarise
from vitnas.stages.searching import WEIGHTS, Inherited, fold_folder
from vitnas.stages.training import train
from vitnas.stages.work import RunImages, Work, save_weights
from vitnas.supernet import Supernet
from vitnas.supernet.pretrained import start_from_timm
from vitnas.train import Monitor, Rewiring, TaskConfig, TeacherConfig, TrainConfig


def train_supernet(
    work: Work,
    images: RunImages,
    supernet: Supernet,
    sampler: RunSampler,
    task: TaskConfig,
    teacher: TeacherConfig,
    config: TrainConfig,
    pretrained: str | None = None,
    fold: int = 0,
) -> None:
    """Train `supernet`, continuing from its checkpoint, into supernet.safetensors, and the sampler where it learns.

    Args:
        fold: which part of train is held out; of all but the first only the weights are kept.
    """
    target = fold_folder(work.folder, fold) / WEIGHTS
    if work.engine.from_first(target.exists):
        return
    images = images.fold(fold)
    if pretrained:
        work.progress.note(start_from_pretrained(supernet, pretrained))
    epochs, made = sampler.config.rewire_epochs, sampler.make()
    fitted = train(
        work,
        images,
        supernet,
        task,
        teacher,
        config,
        stage=f"supernet/fold{fold}" if fold else "supernet",
        grid=supernet.space.largest().grids[-1],
        monitor=Monitor.of(supernet.space, images.holdout, seed=work.seed)
        if config.monitor_every and not fold
        else None,
        sampler=made,
        hooks=[Rewiring(epochs)] if epochs else [],
    )
    if isinstance(made, Focus):
        work.once(sampler.path, lambda: sampler.save(made))
    spent = Spent(learned=fitted.images, seconds=fitted.seconds)
    work.engine.from_first(lambda: TrainedSupernet(spent).write(target.parent))
    work.once(target, lambda: save_weights(fitted.network, target))


def start_from_pretrained(supernet: Supernet, pretrained: str) -> str:
    """Begin from the network that a run names; one sentence says what was taken.

    Raises:
        UserError: that network cannot be loaded, or the space's Archs have other parts.
    """
    image_size = supernet.space.largest().image_size
    return start_from_timm(supernet, load_network(pretrained, what="pretrained", image_size=image_size))


def tell_sampler(work: Work, sampler: RunSampler, inherited: Inherited) -> None:
    """sampler.json of a sampler that can be asked, unless it is there."""
    summary = SamplerSummary.path(work.folder)
    work.once(summary, lambda: summarise(sampler.load(), inherited.evaluator, work.seed).save(summary))
