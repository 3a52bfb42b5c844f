import csv, glob, re, numpy as np, io, subprocess, sys
sys.path.insert(0,'/work/main/assets'); 
def rows_txt(path):
    lines=open(path).read().splitlines(); head=lines[0].split()
    out=[]
    for l in lines[1:]:
        parts=l.split(None,len(head)-1); out.append(dict(zip(head,parts)))
    return out
def ms(v,f): 
    v=np.array(v,float); return f"{v.mean():{f}} ± {v.std(ddof=1):{f}}" if len(v)>1 else f"{v[0]:{f}}"
race={}
floor=None
for s in (0,1,2):
    for r in rows_txt(f'/work/s23/race-{s}.txt'):
        if r['case'].startswith('other'): floor=r; continue
        k=re.search(r'runs/(.*)-\d+/',r['case'])[1]
        race.setdefault(k,[]).append(r)
loss={}
for r in csv.DictReader(open('/work/main/assets/race.csv')):
    if float(r['share'])==1: loss.setdefault(r['kind'],[]).append(r)
T=[]
for k in ('tiny','dit-4','dit-2'):
    L=loss[k]; R=race[k]
    q=' '.join(f"{np.mean([float(x[f'quarter{i}']) for x in L]):.4f}" for i in (1,2,3,4))
    sg=', '.join(f"{np.mean([float(x[f'sigma{i}']) for x in L]):.4f}" for i in (5,10,20))
    T.append(f"| `{k}` | {ms([x['last'] for x in L],'.4f')} | {q} | {sg} | {ms([x['fine'] for x in R],'.1f')} and {ms([x['coarse'] for x in R],'.1f')} | {np.mean([float(x['seam']) for x in R]):.2f} | {ms([x['colour'] for x in R],'.1f')} | {float(R[0]['gflops']):.1f} |")
print("RACE floor",floor); print("\n".join(T))
cur={}
for s in (0,1,2):
    for r in csv.DictReader(open(f'/work/s23/curve-{s}.csv')):
        c=re.sub(r"--ckpt \S*?([^/]+)-\d+/checkpoint.pt", r"\1", r['case']); cur.setdefault(c,[]).append(r)
print("CURVE")
for c,R in cur.items():
    print(f"| {c} | {float(R[0]['gflops']):.1f} | {np.mean([float(x['ms']) for x in R]):.0f} | {ms([x['fine'] for x in R],'.1f')} | {ms([x['coarse'] for x in R],'.1f')} | {np.mean([float(x['seam']) for x in R]):.2f} | {np.mean([float(x['colour']) for x in R]):.1f} | {[x['fine'] for x in R]}")
# at shares
print("SHARES")
by={}
for r in csv.DictReader(open('/work/main/assets/race.csv')): by.setdefault((r['kind'],r['seed']),[]).append((float(r['share']),float(r['last'])))
for k in ('tiny','dit-4','dit-2'):
    for sh in (1/3,2/3,1):
        v=[np.interp(sh,*zip(*sorted(by[k,s]))) for s in ('0','1','2')]
        print(k,round(sh,2),ms(v,'.4f'))
# time to reach dit-2's end
goal=np.mean([float(x['last']) for x in loss['dit-2']])
for k in ('tiny','dit-4'):
    print(k,'reaches',goal,[next((sh for sh,l in sorted(by[k,s]) if l<=goal),None) for s in ('0','1','2')])
