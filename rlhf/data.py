# placeholder until the real one lands
import json
from dataclasses import dataclass
import torch
class DataError(ValueError): pass
@dataclass(frozen=True)
class Rec:
    prompt:str=""; completion:str=""; completions:tuple=(); ranks:tuple=()
@dataclass(frozen=True)
class Example:
    prompt_ids:list; completion_ids:list
@dataclass(frozen=True)
class RankedExample:
    prompt_ids:list; completion_ids:list; ranks:list
@dataclass(frozen=True)
class PromptExample:
    prompt_ids:list; text:str
def _r(paths): return [json.loads(l) for p in paths for l in open(p)]
def read_demonstrations(paths): return [Rec(prompt=r["prompt"],completion=r["completion"]) for r in _r(paths)]
def read_comparisons(paths): return [Rec(prompt=r["prompt"],completions=tuple(r["completions"]),ranks=tuple(r["ranks"])) for r in _r(paths) if len(set(r["ranks"]))>1]
def read_prompts(paths): return [Rec(prompt=r["prompt"]) for r in _r(paths)]
def read_texts(paths): return [r["text"] for r in _r(paths)]
def _c(t,s,n):
    ids=t(s,add_special_tokens=False).input_ids+[t.eos_token_id]
    return ids[:n]
def tokenize_demonstrations(rs,t,*,max_prompt_tokens,max_response_tokens,context_length): return [Example(t(r.prompt).input_ids,_c(t,r.completion,max_response_tokens)) for r in rs]
def tokenize_comparisons(rs,t,*,max_prompt_tokens,max_response_tokens,context_length): return [RankedExample(t(r.prompt).input_ids,[_c(t,c,max_response_tokens) for c in r.completions],list(r.ranks)) for r in rs]
def tokenize_prompts(rs,t,*,max_prompt_tokens,max_response_tokens,context_length): return [PromptExample(t(r.prompt).input_ids,r.prompt) for r in rs]
def tokenize_texts(texts,t,*,length):
    ids=[i for e in t(list(texts)).input_ids for i in e+[t.eos_token_id]]
    n=len(ids)//length
    return torch.tensor(ids[:n*length]).view(n,length)
