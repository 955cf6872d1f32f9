"""The tables of the papers: FID and CLIP score on MS-COCO by the protocol of the peers.

May import: the core and the rooms of training up to ``train.evaluation``.
"""
