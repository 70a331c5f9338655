"""The engine of one process."""

from neobert.commands.progress import Progress
from neobert.sharded.job import Job, Run, Summary


def run(job: Job) -> Summary:
    """Encode all shards that are not there yet.

    Raises:
        InputError: The input, or shards of other options.
        OutputError: The disk is full or fails; finished shards are kept.
    """
    source = job.source()
    with job.prepared(source) as folder:
        run, todo = Run(), [folder.plan[n] for n in folder.unfinished()]
        if todo:
            encoder = job.encoder(folder)
            run.began()
            done = folder.plan.rows - sum(shard.rows for shard in todo)
            with Progress(folder.plan.rows, done, quiet=job.quiet) as progress:
                for _ in job.work(encoder, source, folder, todo, progress.update):
                    pass
                run.add(progress.texts, progress.tokens)
        return job.finish(source, folder, run)
