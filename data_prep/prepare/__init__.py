"""``nemo-pre data prepare``: a public VLM dataset, as it was downloaded, into shards."""

from __future__ import annotations

from typing import Any

from nemo_pre.options import PathText, Seed


def prepare(
    source: PathText,
    out: PathText,
    kind: str = "auto",
    images: PathText | None = None,
    masks: PathText | None = None,
    name: str | None = None,
    subset: int | None = None,
    val_samples: int = 1000,
    seed: Seed = 0,
    shuffle: bool = True,
    shard_samples: int = 10_000,
    shard_mb: int = 1000,
    verify_images: bool = False,
    max_pixels: int | None = None,
    reencode: str | None = None,
    repair: str | list[str] | None = None,
    on_error: str = "drop",
    workers: int | None = None,
) -> dict[str, Any]:
    """Writes the dataset at SOURCE as tar shards into OUT, which then is a data.path and an Energon dataset.

      nemo-pre data prepare LLaVA-Pretrain/blip_laion_cc_sbu_558k.json data/llava_pretrain
      nemo-pre data prepare FineVision data/finevision_800k subset=800000
      nemo-pre data prepare blend.yaml data/mix

    A run that was stopped continues where it was when started again; one that is complete does nothing. The
    bytes depend on the source and on every option but workers and on_error.

    source         LLaVA-style JSON or JSONL, a folder of parquet files (LLaVA-OneVision, FineVision), a COCO-Stuff
                   folder, or a YAML file of several (sources: [{path, kind, name, images, masks, weight or
                   samples, cap}]; weight 0.5 takes a random half, 2 takes everything twice; paths are relative
                   to the YAML file)
    kind           auto, llava, llava_onevision, finevision, coco_stuff or blend
    images, masks  folders of the images and of the pixel maps (null: found beside SOURCE)
    name           of the dataset (null: from SOURCE)
    subset         this many samples, drawn by seed (null: all)
    val_samples    of these, set aside for validation; counted before bad samples are dropped
    shuffle        over the whole dataset, by seed; false keeps the order of the source
    shard_samples  at most this many samples in a shard, and
    shard_mb       at most this many 10^6 bytes, unless one sample is larger
    verify_images  decode every image, not only its header: finds cut files, takes longer
    max_pixels     shrink larger images to this many pixels (null: keep the files as they are)
    reencode       jpeg, png or webp: write every image anew (null: only GIF and the like, as PNG)
    repair         keep samples that would be dropped, by one or several of (null: none)
                   first_answer    an answer before the first question is left out
                   empty_answer    a question with an empty answer is left out, if others stay
                   repeated_tag    a question that repeats <image> for its one image shows it once
                   unseen_image    images that no question shows are left out, and the text stays
                   untagged_image  images that no question shows go before the first one
                   text_tag        <image> in an answer, or in a sample without an image, is text
                   llava           what LLaVA-1.5's loader takes: all of these but untagged_image
    on_error       drop (and list in OUT/dropped.jsonl) or raise, at a sample that cannot be trained on
    workers        processes (null: one per core)

    Parquet rows that are taken are first unpacked under OUT, so OUT needs their size twice until it is done.

    Raises:
        ValueError: an option is out of range, the source cannot be read, OUT holds something else, or disk full.
    """
    from data_prep.prepare.blend import Source, single_source, sources_of_blend
    from data_prep.prepare.build import build
    from data_prep.prepare.plan import Options
    from data_prep.prepare.repairs import chosen_repairs

    sources: list[Source]
    if kind == "blend" or (kind == "auto" and source.endswith((".yaml", ".yml"))):
        if images or masks:
            raise ValueError("images and masks belong to one source: write them into the blend's YAML file")
        blend_name, sources = sources_of_blend(source)
    else:
        sources = [single_source(source, kind, images, masks, name)]
        blend_name = sources[0].name
    options = Options(
        subset=subset,
        val_samples=val_samples,
        seed=seed,
        shuffle=shuffle,
        shard_samples=shard_samples,
        shard_mb=shard_mb,
        verify_images=verify_images,
        max_pixels=max_pixels,
        reencode=reencode,
        repair=chosen_repairs(repair),
    )
    return build(name or blend_name, sources, options, out, on_error, workers)
