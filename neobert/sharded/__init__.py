"""Embeddings of any number of texts as a folder of shards, made by one process or by many.

`plan` cuts the input into shards, `folder` is the output, `work` encodes shards in one process, and
`local`, `torchrun` and `ray` are the engines that hand them out. A shard is whole windows of texts,
so its bytes are the same whichever process made it, and however often the job was killed.
"""
