"""Image retrieval from the command line: embeddings in; neighbour lists, tables and pictures out.

    python retrieve.py search  --dataset 1K --model mrl --sizes 8 16 2048                    # neighbors/mrl/
    python retrieve.py rerank  --retrieval_dim 16 --rerank_dims 2048 --shortlist 200         # neighbors/reranked/mrl/
    python retrieve.py funnel  --retrieval_dim 8 --rerank_dims 16 32 64 128 2048 --shortlists 800 400 200 50 10
    python retrieve.py metrics                                                               # all lists of the data set
    python retrieve.py report                                          # all sizes, adaptive grid, funnels: report/
    python retrieve.py index   --retrieval_dim 16 --index hnsw32       # adaptive retrieval as one index, to serve from
    python retrieve.py project --model ff --method svd                 # SVD or JL as arrays: then --model ff_svd
    python retrieve.py adanns                        # clusters at one size, search at another, and codes: report/
    python retrieve.py qdrant  --url http://localhost:6333 --retrieval_dim 16 --rerank_dims 2048 --shortlists 200

Reads {1K|V2|4K|<name>}_{train|val}_{model}-X.npy and -y.npy from --embeddings (train: the database, val: the queries;
V2's database is 1K's). What is there and fits the embeddings is used again, and an interrupted command goes on where it
stopped. The notebooks call the same functions (stages.py).
"""
import argparse
import sys

import adanns
import pandas as pd
import shards
from adanns import BYTES
from indexes import INDEXES, STORES
from metrics import KS
from projection import project
from report import choose_sizes, format_table, report, report_file, write_table
from stages import ensure_neighbors, ensure_qdrant, ensure_reranked, ensure_serving_index, score, score_all
from study import MODELS, PROJECTIONS, Study, Task

from mrl_files import bounded, command_line, file_path, leave_group

COUNT = bounded(int, 1)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (run, add) in COMMANDS.items():
        command = commands.add_parser(name, help=run.__doc__.splitlines()[0], description=run.__doc__,
                                      epilog=example(name), formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(run=run)
        add_embeddings(command)
        add(command)
        if name in FIRST_STAGE:
            add_first_stage(command, several_indexes=name == "report")
        add_results(command, lists=name not in ("metrics", "index", "project"))
        if name != "qdrant":
            add_search_place(command)
    return parser


def example(name):
    """The command's line at the head of this file."""
    line = next(line.strip() for line in __doc__.splitlines() if f"retrieve.py {name} " in line)
    return f"example:\n  {line.partition('  #')[0].strip()}"


def add_embeddings(command):
    add, default = command.add_argument, Task()
    add("--embeddings", type=file_path, default=default.embeddings,
        help="folder of the -X.npy and -y.npy files (%(default)s)")
    add("--dataset", default=default.dataset, help="1K, V2, 4K or another name that the files begin with (%(default)s)")
    add("--model", default=default.model, choices=MODELS, metavar="MODEL", help="%(choices)s (default %(default)s)")


def add_results(command, lists):
    command.add_argument("--output", type=file_path, default=Task().output,
                         help="folder for index_files/, neighbors/, report/ (this one)")
    if lists:
        command.add_argument("--csv", action="store_true",
                             help="lists as header-less CSV, the original's format, not .npy")


def add_search_place(command):
    add, default = command.add_argument, Task()
    add("--memory_gb", type=float, default=default.memory_gb,
        help="of vectors held at once; a larger exact search reads the file in blocks (%(default)s)")
    add("--device", default=default.device, choices=("auto", "cpu", "cuda"), help="for exact search (%(default)s)")


def add_first_stage(command, several_indexes):
    add, default = command.add_argument, Task().index
    add("--index", default=[default] if several_indexes else default, choices=INDEXES,
        metavar="INDEX", nargs="+" if several_indexes else None,
        help=f"of the first stage: %(choices)s (default {default})")
    add("--nlist", type=COUNT, help="ivf_*: clusters of the database (a power of two near 2 sqrt(n))")
    add("--nprobe", type=COUNT, help="ivf_*: clusters that a search visits (a 32nd of them, 16 at least)")


def add_search(command):
    command.add_argument("--sizes", type=COUNT, nargs="+", help="default: all")
    command.add_argument("--k", type=COUNT, help="neighbours a query (2048, or all of a smaller database)")


def add_rerank(command):
    add_stages(command, "each alone: D_r")
    command.add_argument("--shortlist", type=COUNT, default=200, help="candidates re-ranked (%(default)s)")


def add_funnel(command):
    add_stages(command, "one after another")
    command.add_argument("--shortlists", type=COUNT, nargs="+", required=True, action="append",
                         help="candidates kept at each of them; give the flag again for another funnel")


def add_stages(command, how):
    command.add_argument("--retrieval_dim", type=COUNT, required=True, help="size of the first stage: D_s")
    command.add_argument("--k", type=COUNT, help="length of its list (what is there, if long enough)")
    command.add_argument("--rerank_dims", type=COUNT, nargs="+", required=True, help=f"to re-rank at, {how}")


def add_metrics(command):
    command.add_argument("lists", type=file_path, nargs="*",
                         help=".npy or .csv files (all of the data set and model in neighbors/)")
    command.add_argument("--ks", type=COUNT, nargs="+", default=KS, help="(10 25 50 100), as far as a list goes")


def add_report(command):
    command.add_argument("--sizes", type=COUNT, nargs="+", help="default: all")
    command.add_argument("--shortlist", type=COUNT, default=200, help="of the adaptive grid (%(default)s)")
    command.add_argument("--storage", nargs="+", default=(), choices=STORES,
                         help="the adaptive grid once more, by serving indexes that store so what they re-rank")


def add_index(command):
    command.add_argument("--retrieval_dim", type=COUNT, required=True, help="size of the shortlist's search: D_s")
    command.add_argument("--rerank_dim", "--rerank_dims", type=COUNT,
                         help="size it is re-ranked at: D_r (the full width)")
    command.add_argument("--shortlist", type=COUNT, default=200, help="candidates re-ranked for k = 10 (%(default)s)")
    command.add_argument("--storage", default="float32", choices=STORES, help="of what is re-ranked (%(default)s)")


def add_project(command):
    command.add_argument("--method", required=True, choices=PROJECTIONS,
                         help="svd of the database, or jl: a random projection")
    command.add_argument("--size", type=COUNT, help="default: the full width, whose prefixes are the smaller sizes")


def add_adanns(command):
    command.add_argument("--sizes", type=COUNT, nargs="+", help="of clusters and of search (all)")
    command.add_argument("--nlist", type=COUNT, help="clusters (a power of two near 2 sqrt(n))")
    command.add_argument("--nprobes", type=COUNT, nargs="+",
                         help="clusters that a search visits, one after another (1 2 4 8 16 32)")
    command.add_argument("--bytes", type=COUNT, nargs="*", default=BYTES, help="of product quantisers (8 16 32 64)")


def add_qdrant(command):
    place = command.add_mutually_exclusive_group()
    place.add_argument("--url", help="of a Qdrant server or cluster; its key, if it has one: QDRANT_API_KEY")
    place.add_argument("--path", type=file_path,
                       help="folder for Qdrant's local mode: for trials, slow (without --url and --path: in memory)")
    command.add_argument("--collection", help="(<dataset>_<model>)")
    command.add_argument("--sizes", type=COUNT, nargs="+", help="that the collection holds (those of the query)")
    command.add_argument("--shards", type=COUNT, help="of the collection (the server's default)")
    command.add_argument("--replicas", type=COUNT, help="of each shard (the server's default)")
    command.add_argument("--quantize", action="store_true",
                         help="--retrieval_dim's vectors in 8 bits a number too, kept in memory")
    command.add_argument("--retrieval_dim", type=COUNT, required=True, help="size of the first stage: D_s")
    command.add_argument("--rerank_dims", type=COUNT, nargs="+", required=True, help="one after another")
    command.add_argument("--shortlists", type=COUNT, nargs="+", required=True, help="candidates kept at each of them")


def search_command(study, args):
    """the k nearest neighbours at each size"""
    for size in choose_sizes(study, args.sizes):
        print(ensure_neighbors(study, size, args.k))


def rerank_command(study, args):
    """adaptive retrieval: a shortlist re-ranked at a larger size"""
    for dim in args.rerank_dims:
        print(ensure_reranked(study, args.retrieval_dim, [dim], [args.shortlist], args.k))


def funnel_command(study, args):
    """funnel retrieval: ever shorter lists re-ranked at ever larger sizes"""
    for shortlists in args.shortlists:
        print(ensure_reranked(study, args.retrieval_dim, args.rerank_dims, shortlists, args.k))


def metrics_command(study, args):
    """mAP, precision, recall, top-k, MFLOPs and time of neighbour lists"""
    rows = [score(study, file, args.ks) for file in args.lists] if args.lists else score_all(study, args.ks)
    table, path = pd.DataFrame(rows), report_file(study.task, "metrics.csv")
    print(format_table(table))
    write_table(table, path)
    print(f"all columns: {path}", file=sys.stderr)


def report_command(study, args):
    """the paper's study: all sizes, the adaptive grid, the funnels; tables and pictures"""
    print(format_table(report(study, args.index, args.sizes, args.shortlist, storages=args.storage)))
    print(f"all columns and the pictures: {report_file(study.task, '*')}", file=sys.stderr)


def index_command(study, args):
    """adaptive retrieval as one FAISS index, to serve from"""
    print(ensure_serving_index(study, args.retrieval_dim, args.rerank_dim, args.shortlist, args.storage)[0])


def project_command(study, args):
    """SVD or random projection of embeddings, as arrays beside them that all commands read"""
    for file in project(study, args.method, args.size):
        print(file)


def adanns_command(study, args):
    """the study of AdANNS: clusters at one size, search at another; product quantisers"""
    table = adanns.run(study, args.sizes, args.nlist, args.nprobes, args.bytes)
    print(adanns.format_study(table, study))


def qdrant_command(study, args):
    """embeddings uploaded to Qdrant, and adaptive or funnel retrieval by it"""
    print(ensure_qdrant(study, args.retrieval_dim, args.rerank_dims, args.shortlists, args.url, args.path,
                       args.collection, args.sizes, shards=args.shards, replicas=args.replicas,
                       quantize=args.quantize))


COMMANDS = {"search": (search_command, add_search), "rerank": (rerank_command, add_rerank),
            "funnel": (funnel_command, add_funnel), "metrics": (metrics_command, add_metrics),
            "report": (report_command, add_report), "index": (index_command, add_index),
            "project": (project_command, add_project),
            "adanns": (adanns_command, add_adanns), "qdrant": (qdrant_command, add_qdrant)}
FIRST_STAGE = ("search", "rerank", "funnel", "report", "index")      # the commands that make an index, or its lists


def main():
    try:
        if shards.join():
            run_command(arguments().parse_args())
            shards.dismiss()
        else:
            shards.serve()
    finally:
        leave_group()


def run_command(args):
    given = {name: value for name, value in vars(args).items() if name in Task._fields}
    if args.command == "report":
        given["index"] = args.index[0]
    args.run(Study(Task(**given)), args)


if __name__ == "__main__":
    command_line(main)
