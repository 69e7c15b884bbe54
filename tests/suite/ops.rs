//! The fast host backend against the definition, on every instruction set of this machine; and, to the bit,
//! against itself: a row alone or among others, a prompt whole or in pieces, on one thread or many.

use std::panic::{AssertUnwindSafe, catch_unwind};

use half::{bf16, f16};
use strait::compress::seen::{self, Coding};
use strait::compress::{FrequencyMap, Group, KeyMap, LayerCompression, Projection};
use strait::ids::PageAddr;
use strait::kv::Arena;
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile, Quantiser, SealedPart, Size, Width, Widths};
use strait::model::config::{ModelConfig, Rope, RopeScaling};
use strait::ops::cpu::{Cpu, Isa};
use strait::ops::reference::Reference;
use strait::ops::{Append, AttendRow, Heads, LayerView, Linear, LowRank, Matrix, MatrixData, Ops, RopeTable, SealJob, Update, append};
use strait::quant::{Order, get, levels};

/// Seeded numbers.
pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn seeded(seed: u64) -> Rng {
        Rng(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// About normal.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..4).map(|_| self.unit() - 0.5).sum::<f32>() * 1.7
    }

    pub(crate) fn normals(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.normal()).collect()
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, (self.next() % (i as u64 + 1)) as usize);
        }
    }
}

/// Instruction sets to test; says which are not here.
fn isas() -> Vec<Isa> {
    for isa in Isa::ALL {
        match Cpu::with_isa(isa, 1) {
            Ok(_) => assert!(isa.is_available()),
            Err(e) => println!("skipped {isa}: {e}"),
        }
    }
    Isa::ALL.into_iter().filter(|isa| isa.is_available()).collect()
}

fn cpu(isa: Isa, threads: usize) -> Cpu {
    Cpu::with_isa(isa, threads).unwrap()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|v| v.to_bits()).collect()
}

#[track_caller]
pub(crate) fn assert_same(got: &[f32], want: &[f32], what: std::fmt::Arguments<'_>) {
    let different = got.iter().zip(want).position(|(a, b)| a.to_bits() != b.to_bits());
    assert_eq!(got.len(), want.len(), "{what}");
    if let Some(i) = different {
        panic!("{what}: element {i} is {} ({:#x}), not {} ({:#x})", got[i], got[i].to_bits(), want[i], want[i].to_bits());
    }
}

#[track_caller]
pub(crate) fn assert_near(got: &[f32], want: &[f32], tolerance: f32, what: std::fmt::Arguments<'_>) {
    assert_eq!(got.len(), want.len(), "{what}");
    let size = want.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        assert!((a - b).abs() <= tolerance * size, "{what}: element {i} is {a}, not {b} (of up to {size})");
    }
}

#[test]
fn linear_agrees_with_the_definition_and_is_the_same_in_any_batch() {
    let rng = &mut Rng(1);
    const ROWS: usize = 65;
    const OUT: usize = 65;
    let machines: Vec<_> = isas().into_iter().map(|isa| (cpu(isa, 1), cpu(isa, 2))).collect();
    for inputs in [1, 15, 16, 17, 31, 32, 33, 100, 511, 512, 513, 1023, 1024, 1025, 2049] {
        let x = rng.normals(ROWS * inputs);
        let w = rng.normals(OUT * inputs);
        let halves: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
        let bias = rng.normals(OUT);
        let before = rng.normals(ROWS * OUT);
        for data in [MatrixData::F32(&w), MatrixData::Bf16(&halves)] {
            let bf16 = matches!(data, MatrixData::Bf16(_));
            let run = |ops: &dyn Ops, x: &[f32], out: usize, biased: bool, accumulate: bool, first: usize| {
                let rows = x.len() / inputs;
                let data = match data {
                    MatrixData::F32(w) => MatrixData::F32(&w[..out * inputs]),
                    MatrixData::Bf16(w) => MatrixData::Bf16(&w[..out * inputs]),
                };
                let mut y: Vec<f32> = (0..rows * out).map(|i| before[(first + i / out) * OUT + i % out]).collect();
                let w = Matrix { out_features: out, in_features: inputs, data };
                let job = Linear { w, inner: None, bias: biased.then_some(&bias[..out]), accumulate, y: &mut y };
                ops.linear(x, rows, &mut [job]);
                y
            };
            for (biased, accumulate) in [(false, false), (true, true)] {
                let want = run(&Reference, &x, OUT, biased, accumulate, 0);
                for (one, two) in &machines {
                    let whole = run(one, &x, OUT, biased, accumulate, 0);
                    let rounded = bf16 && one.isa().rounds_activations();
                    for (i, (got, want)) in whole.iter().zip(&want).enumerate() {
                        let (r, o) = (i / OUT, i % OUT);
                        let sum: f32 = x[r * inputs..][..inputs].iter().zip(&w[o * inputs..]).map(|(a, b)| (a * b).abs()).sum();
                        let tolerance = sum * if rounded { 1.0 / 256.0 } else { 1e-6 } + 1e-6;
                        assert!((got - want).abs() <= tolerance, "{} {inputs} inputs, bf16 {bf16}: {got}, not {want}", one.isa());
                    }
                    assert_same(&run(two, &x, OUT, biased, accumulate, 0), &whole, format_args!("two threads"));
                    for rows in [1, 2, 3, 4, 5, 6, 7, 8, 13, 24, 32, 33, 64, 65] {
                        for out in [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 64, 65] {
                            // Widths and row counts meet kernels apart: all pairs of them at two lengths do.
                            if ![17, 513].contains(&inputs) && rows != 5 && out != 9 {
                                continue;
                            }
                            // A corner of the whole: the last rows, the first columns.
                            let first = ROWS - rows;
                            let got = run(one, &x[first * inputs..], out, biased, accumulate, first);
                            let want: Vec<f32> = (0..rows * out).map(|i| whole[(first + i / out) * OUT + i % out]).collect();
                            assert_same(&got, &want, format_args!("{} {rows} rows, {inputs} inputs, {out} outputs", one.isa()));
                        }
                    }
                }
            }
        }
    }
}

#[test]
fn one_row_or_two_meet_long_weights_as_many_do() {
    let rng = &mut Rng(5);
    // Whole blocks in fours, alone, and a part; inputs that fit the first-level cache as two rows, as one, and not at all.
    for inputs in [2560, 2700, 5000, 9000, 14_400] {
        let (rows, out) = (26, 13);
        let (x, w, before) = (rng.normals(rows * inputs), rng.normals(out * inputs), rng.normals(rows * out));
        let halves: Vec<bf16> = w.iter().map(|&v| bf16::from_f32(v)).collect();
        for isa in isas() {
            let cpu = cpu(isa, 2);
            for data in [MatrixData::F32(&w), MatrixData::Bf16(&halves)] {
                let run = |first: usize, n: usize| {
                    let mut y = before[first * out..(first + n) * out].to_vec();
                    let w = Matrix { out_features: out, in_features: inputs, data };
                    let job = Linear { w, inner: None, bias: Some(&before[..out]), accumulate: true, y: &mut y };
                    cpu.linear(&x[first * inputs..(first + n) * inputs], n, &mut [job]);
                    y
                };
                let whole = run(0, rows);
                for (first, n) in [(0, 1), (25, 1), (0, 2), (24, 2), (7, 3)] {
                    let want = &whole[first * out..(first + n) * out];
                    assert_same(&run(first, n), want, format_args!("{isa} {n} of {inputs} inputs from {first}"));
                }
            }
        }
    }
}

/// Factors in both types, their `up` in tiles.
struct Thin {
    rank: usize,
    shape: (usize, usize),
    down: Vec<f32>,
    up: Vec<f32>,
    halves: [Vec<bf16>; 2],
}

impl Thin {
    fn new(rng: &mut Rng, rank: usize, shape @ (out, inputs): (usize, usize)) -> Thin {
        let (down, mut up) = (rng.normals(rank * inputs), rng.normals(out.div_ceil(64) * rank * 64));
        for (i, v) in up.iter_mut().enumerate() {
            // What lies past the last output must not matter.
            if i / (rank * 64) * 64 + i % 64 >= out {
                *v = f32::NAN;
            }
        }
        let halves = [&down, &up].map(|x| x.iter().map(|&v| bf16::from_f32(v)).collect());
        Thin { rank, shape, down, up, halves }
    }

    fn low_rank(&self, bf16: bool) -> LowRank<'_> {
        let [down, up] = if bf16 {
            [MatrixData::Bf16(&self.halves[0]), MatrixData::Bf16(&self.halves[1])]
        } else {
            [MatrixData::F32(&self.down), MatrixData::F32(&self.up)]
        };
        LowRank { rank: self.rank, in_features: self.shape.1, out_features: self.shape.0, down, up }
    }
}

#[test]
fn low_rank_agrees_with_the_definition_and_a_row_does_not_see_the_others() {
    let rng = &mut Rng(77);
    let machines: Vec<_> = isas().into_iter().map(|isa| (cpu(isa, 1), cpu(isa, 2))).collect();
    for (inputs, outs) in [(1, [1, 3]), (33, [64, 65]), (512, [100, 7]), (1030, [128, 200])] {
        // Rows of several adapters, ranks and targets, and rows of none between them.
        let segments: [(std::ops::Range<usize>, usize, usize); 7] =
            [(0..1, 1, 0), (1..4, 3, 1), (0..1, 16, 1), (5..6, 5, 0), (7..40, 8, 0), (7..40, 4, 1), (44..45, 130, 0)];
        const ROWS: usize = 46;
        let x = rng.normals(ROWS * inputs);
        let thins: Vec<Thin> = segments.iter().map(|(_, rank, target)| Thin::new(rng, *rank, (outs[*target], inputs))).collect();
        let before: Vec<Vec<f32>> = outs.iter().map(|out| rng.normals(ROWS * out)).collect();
        for bf16 in [false, true] {
            let run = |ops: &dyn Ops, only: Option<usize>| {
                let (x, rows): (&[f32], _) = match only {
                    None => (&x, 0..ROWS),
                    Some(row) => (&x[row * inputs..][..inputs], row..row + 1),
                };
                let mut ys: Vec<Vec<f32>> = before.iter().zip(outs).map(|(y, out)| y[rows.start * out..rows.end * out].to_vec()).collect();
                let updates = segments.iter().zip(&thins).filter_map(|((at, _, target), thin)| {
                    let (from, to) = (at.start.max(rows.start), at.end.min(rows.end));
                    let rows = from.checked_sub(rows.start)?..to.checked_sub(rows.start)?;
                    (from < to).then(|| Update { factors: thin.low_rank(bf16), rows, target: *target })
                });
                let updates: Vec<Update<'_>> = updates.collect();
                let mut targets: Vec<&mut [f32]> = ys.iter_mut().map(|y| &mut y[..]).collect();
                ops.low_rank(x, &updates, &mut targets);
                ys
            };
            let want = run(&Reference, None);
            for (one, two) in &machines {
                let whole = run(one, None);
                for (got, want) in whole.iter().zip(&want) {
                    assert_near(got, want, 2e-6 * (inputs as f32).sqrt(), format_args!("{} {inputs} {outs:?} bf16 {bf16}", one.isa()));
                }
                for (target, got) in run(two, None).iter().enumerate() {
                    assert_same(got, &whole[target], format_args!("{} on two threads, {inputs}", one.isa()));
                }
                for row in 0..ROWS {
                    for (target, got) in run(two, Some(row)).iter().enumerate() {
                        let out = outs[target];
                        assert_same(got, &whole[target][row * out..][..out], format_args!("{} row {row} alone, {inputs}", one.isa()));
                    }
                }
                // Rows of no adapter keep what they had.
                for (target, out) in outs.iter().enumerate() {
                    for row in [4, 6, 41, 45] {
                        let at = row * out..(row + 1) * out;
                        assert_same(&whole[target][at.clone()], &before[target][at], format_args!("row {row} wears nothing"));
                    }
                }
            }
        }
    }
}

#[test]
fn linear_shares_many_rows_and_jobs_over_threads_without_a_trace() {
    let rng = &mut Rng(2);
    let (rows, inputs) = (401, 300);
    let x = rng.normals(rows * inputs);
    let weights: Vec<(usize, Vec<f32>, Vec<bf16>)> = [130, 1, 64, 257, 10]
        .map(|out| {
            let w = rng.normals(out * inputs);
            let halves = w.iter().map(|&v| bf16::from_f32(v)).collect();
            (out, w, halves)
        })
        .into();
    for isa in isas() {
        let run = |cpu: &Cpu, x: &[f32]| {
            let rows = x.len() / inputs;
            let mut ys: Vec<Vec<f32>> = weights.iter().map(|(out, ..)| vec![f32::NAN; rows * out]).collect();
            let mut jobs: Vec<Linear<'_>> = weights
                .iter()
                .zip(&mut ys)
                .enumerate()
                .map(|(i, ((out, w, halves), y))| {
                    let data = if i % 2 == 0 { MatrixData::F32(w) } else { MatrixData::Bf16(halves) };
                    Linear { w: Matrix { out_features: *out, in_features: inputs, data }, inner: None, bias: None, accumulate: false, y }
                })
                .collect();
            cpu.linear(x, rows, &mut jobs);
            ys
        };
        let (one, three) = (cpu(isa, 1), cpu(isa, 3));
        let whole = run(&one, &x);
        for (got, want) in run(&three, &x).iter().zip(&whole) {
            assert_same(got, want, format_args!("{isa}, three threads"));
        }
        for row in [0, 1, 191, 192, 200, 400] {
            for (got, (want, (out, ..))) in run(&three, &x[row * inputs..][..inputs]).iter().zip(whole.iter().zip(&weights)) {
                assert_same(got, &want[row * out..][..*out], format_args!("{isa}, row {row} alone"));
            }
        }
        run(&one, &[]);
    }
}

#[test]
fn norms_ropes_and_activations_agree_with_the_definition() {
    let rng = &mut Rng(3);
    for isa in isas() {
        let (one, three) = (cpu(isa, 1), cpu(isa, 3));
        for (rows, width) in [(1, 1), (3, 7), (2, 16), (5, 100), (300, 257)] {
            let (x, weight) = (rng.normals(rows * width), rng.normals(width));
            let run = |ops: &dyn Ops, x: &[f32]| {
                let mut out = vec![f32::NAN; x.len()];
                ops.rms_norm(x, &weight, 1e-5, &mut out);
                out
            };
            let got = run(&one, &x);
            assert_near(&got, &run(&Reference, &x), 1e-6, format_args!("{isa} norm of {width}"));
            assert_same(&run(&three, &x), &got, format_args!("{isa} norm, three threads"));
            assert_same(&run(&one, &x[(rows - 1) * width..]), &got[(rows - 1) * width..], format_args!("{isa} norm of a row alone"));
        }
        for (half, heads, rows) in [(4, 1, 1), (32, 3, 5), (40, 2, 3), (50, 2, 300), (64, 4, 70)] {
            let table = rope_table(half, 200, 1.0);
            let positions: Vec<u32> = (0..rows).map(|_| (rng.next() % 200) as u32).collect();
            let x = rng.normals(rows * heads * 2 * half);
            let run = |ops: &dyn Ops| {
                let mut x = x.clone();
                ops.rope(&mut x, heads, &table, &positions);
                x
            };
            let got = run(&one);
            assert_near(&got, &run(&Reference), 1e-6, format_args!("{isa} rope of {half}"));
            assert_same(&run(&three), &got, format_args!("{isa} rope, three threads"));
        }
        for n in [1, 15, 16, 17, 40_000] {
            let (gate, up) = ((0..n).map(|_| (rng.unit() - 0.5) * 160.0).collect::<Vec<f32>>(), rng.normals(n));
            let run = |ops: &dyn Ops| {
                let mut gate = gate.clone();
                ops.silu_mul(&mut gate, &up);
                gate
            };
            let got = run(&one);
            for (i, got) in got.iter().enumerate() {
                let g = f64::from(gate[i]);
                let want = g / (1.0 + (-g).exp()) * f64::from(up[i]);
                // Far below zero this is the relative error of the exponential.
                assert!((f64::from(*got) - want).abs() <= 1e-6 * want.abs(), "{isa} silu of {g}: {got}, not {want}");
            }
            assert_same(&run(&three), &got, format_args!("{isa} silu, three threads"));
        }
        let mut ends = [f32::NEG_INFINITY, -1e30, -200.0, -88.5, 0.0, 200.0, 1e30, f32::NAN];
        one.silu_mul(&mut ends, &[1.0; 8]);
        assert!(ends[0].is_nan() || ends[0] == 0.0, "{isa}: silu of minus infinity is {}", ends[0]);
        assert!(ends[1..4].iter().all(|v| v.abs() < 1e-6), "{isa}: {ends:?}");
        assert_eq!(bits(&ends[4..7]), bits(&[0.0, 200.0, 1e30]), "{isa}");
        assert!(ends[7].is_nan(), "{isa}: NaN is lost");
    }
}

fn rope_table(half: usize, positions: usize, factor: f32) -> RopeTable {
    let angle = |i: usize| (i / half) as f32 * 10_000f32.powf(-((i % half) as f32) / half as f32);
    RopeTable {
        half,
        cos: (0..positions * half).map(|i| angle(i).cos() * factor).collect(),
        sin: (0..positions * half).map(|i| angle(i).sin() * factor).collect(),
    }
}

/// A cache of one layer, in an arena whose every unwritten byte is ones: NaN in any element type.
pub(crate) struct Cache {
    pub(crate) arena: Arena,
    pub(crate) layout: PageLayout,
    pub(crate) compression: Option<LayerCompression>,
    pub(crate) table: RopeTable,
    pub(crate) shape: Heads,
    free: Vec<PageAddr>,
    rng: Rng,
}

/// One sequence of a [`Cache`].
#[derive(Default, Clone)]
pub(crate) struct Sequence {
    pub(crate) len: usize,
    pub(crate) sealed: Vec<PageAddr>,
    pub(crate) sinks: Option<PageAddr>,
    pub(crate) exact: Vec<PageAddr>,
}

pub(crate) const LAYERS: usize = 2;
pub(crate) const LAYER: usize = 1;

impl Cache {
    pub(crate) fn new(exact: ExactType, shape: Heads, profile: Option<Cskv>) -> Cache {
        let model = ModelConfig {
            family: "llama".into(),
            hidden: 64,
            layers: LAYERS,
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            intermediate: 64,
            vocab: 64,
            max_positions: 4096,
            norm_eps: 1e-5,
            rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            qk_norm: false,
            tied: true,
        };
        let mut rng = Rng(7);
        let widths = profile.as_ref().and_then(thin).map(|w| [w; LAYERS]);
        let layout = PageLayout::new(&model, exact, &Profile { name: "p".into(), cskv: profile.clone() }, widths.as_ref().map(|w| &w[..]));
        let compression = profile.map(|p| {
            let group = p.basis.heads_per_group(shape.kv_heads);
            let sealed = layout.sealed[LAYER];
            let keys = |rng: &mut Rng| match p.basis {
                BasisKind::Frequency => KeyMap::Frequencies(frequencies(rng, shape, sealed.keys.rank)),
                _ => KeyMap::Channels(projection(rng, shape, group, sealed.keys.rank)),
            };
            let maps = match p.basis {
                BasisKind::Identity => LayerCompression::identity(&model),
                BasisKind::Dropped => LayerCompression::dropped(&model),
                _ => LayerCompression { keys: keys(&mut rng), values: projection(&mut rng, shape, group, sealed.values.rank) },
            };
            maps.for_quantisers(&p)
        });
        let sizes = layout.sizes();
        let bytes = sizes.exact.max(sizes.sealed).max(sizes.sinks).max(64);
        let pages = 128u64;
        let mut arena = Arena::new(bytes * pages).unwrap();
        let len = arena.len();
        arena.slice_mut::<u8>(PageAddr(0), 0, len).fill(0xff);
        let mut free: Vec<PageAddr> = (0..pages).map(|i| PageAddr((i * bytes / PageAddr::UNIT) as u32)).collect();
        rng.shuffle(&mut free);
        Cache { arena, layout, compression, table: rope_table(shape.head_dim / 2, 4096, 1.1), shape, free, rng }
    }

    pub(crate) fn view(&self) -> LayerView<'_> {
        LayerView { layer: LAYER, layout: &self.layout, compression: self.compression.as_ref() }
    }

    /// Appends `n` positions of random keys and values.
    pub(crate) fn extend(&mut self, seq: &mut Sequence, n: usize) {
        let width = self.shape.kv_heads * self.shape.head_dim;
        let (k, v) = (self.rng.normals(n * width), self.rng.normals(n * width));
        let sealed = 64 * seq.sealed.len();
        while sealed + 64 * seq.exact.len() < seq.len + n {
            seq.exact.push(self.free.pop().unwrap());
        }
        let view = LayerView { layer: LAYER, layout: &self.layout, compression: self.compression.as_ref() };
        let exact_offset = LAYER * self.layout.exact_layer_bytes();
        append(
            &mut self.arena,
            &Append { view, pages: &seq.exact, first_page: sealed as u32, exact_offset, position: seq.len as u32, k: &k, v: &v },
        );
        seq.len += n;
    }

    /// Seals the first `n` exact pages.
    pub(crate) fn seal(&mut self, ops: &dyn Ops, seq: &mut Sequence, n: usize) {
        let exact_offset = LAYER * self.layout.exact_layer_bytes();
        let sinks = self.layout.sinks as usize;
        if seq.sealed.is_empty() && sinks > 0 {
            let to = self.free.pop().unwrap();
            self.keep_sinks(seq.exact[0], to);
            seq.sinks = Some(to);
        }
        let jobs: Vec<SealJob> = (0..n)
            .map(|i| {
                let page = seq.sealed.len() + i;
                let skip = if page == 0 { sinks as u32 } else { 0 };
                SealJob { from: seq.exact[i], from_offset: exact_offset, to: self.free.pop().unwrap(), skip, position: 64 * page as u32 }
            })
            .collect();
        let view = LayerView { layer: LAYER, layout: &self.layout, compression: self.compression.as_ref() };
        ops.seal(&mut self.arena, view, &self.table, &jobs);
        for job in jobs {
            // What is sealed must not be read from its exact page again.
            let bytes = self.layout.exact_layer_bytes();
            self.arena.slice_mut::<u8>(job.from, exact_offset, bytes).fill(0xff);
            seq.sealed.push(job.to);
        }
        seq.exact.drain(..n);
    }

    fn keep_sinks(&mut self, from: PageAddr, to: PageAddr) {
        let (d, stride, e) = (self.shape.head_dim, self.layout.sinks_stride(), self.layout.exact.bytes());
        let n = self.layout.sinks as usize;
        for head in 0..self.shape.kv_heads {
            let source = LAYER * self.layout.exact_layer_bytes() + 2 * head * d * 64 * e;
            let target = LAYER * self.layout.sinks_layer_bytes() + 2 * head * d * stride * e;
            for c in 0..d {
                self.arena.copy((from, source + c * 64 * e), (to, target + c * stride * e), n * e);
            }
            self.arena.copy((from, source + d * 64 * e), (to, target + d * stride * e), n * d * e);
        }
    }

    /// Attention of the last `n` positions of each sequence, in one call, with these queries.
    pub(crate) fn attend(&self, ops: &dyn Ops, rows: &[(&Sequence, usize)], q: &[f32]) -> Vec<f32> {
        let mut out = vec![f32::NAN; q.len()];
        let mut first = 0;
        let rows: Vec<AttendRow<'_>> = rows
            .iter()
            .map(|&(seq, n)| {
                first += n;
                AttendRow {
                    view: self.view(),
                    first: first - n,
                    n,
                    position: (seq.len - n) as u32,
                    sealed: &seq.sealed,
                    sinks: seq.sinks,
                    exact: &seq.exact,
                    exact_offset: LAYER * self.layout.exact_layer_bytes(),
                }
            })
            .collect();
        ops.attend(&self.arena, self.shape, &self.table, &rows, q, &mut out);
        out
    }

    pub(crate) fn queries(&mut self, n: usize) -> Vec<f32> {
        let width = self.shape.heads * self.shape.head_dim;
        // Larger than life, so that the softmax has peaks and tails.
        self.rng.normals(n * width).iter().map(|v| v * 3.0).collect()
    }
}

/// A random projection that is far from orthogonal, with a mean.
fn projection(rng: &mut Rng, shape: Heads, heads: usize, rank: usize) -> Projection {
    let groups = shape.kv_heads / heads;
    let (channels, ranks) = (heads * shape.head_dim, rank / groups);
    let size = (channels as f32).powf(-0.5);
    Projection {
        mean: rng.normals(groups * channels),
        groups: (0..groups)
            .map(|g| Group {
                channels: g * channels..(g + 1) * channels,
                ranks: g * ranks..(g + 1) * ranks,
                down: rng.normals(channels * ranks).iter().map(|v| v * size).collect(),
                up: rng.normals(channels * ranks).iter().map(|v| v * 0.5).collect(),
            })
            .collect(),
    }
}

/// A random frequency map whose two halves have nothing to do with each other.
fn frequencies(rng: &mut Rng, shape: Heads, rank: usize) -> FrequencyMap {
    let (kv_heads, half) = (shape.kv_heads, shape.head_dim / 2);
    let mut numbers = |n: usize| (0..n).map(|_| [rng.normal(), rng.normal()]).collect();
    let (down, up) = (numbers(rank / 2 * kv_heads), numbers(rank / 2 * kv_heads));
    // Some frequencies have no pair, some have several, in no order.
    let frequencies = (0..rank / 2).map(|j| (j * 7 % half.max(3) / 2) as u32).collect();
    FrequencyMap { kv_heads, half, frequencies, down, up, rotation: None }
}

pub(crate) fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> Heads {
    Heads { heads, kv_heads, head_dim, scale: (head_dim as f32).powf(-0.5) }
}

#[test]
fn attention_over_exact_pages_agrees_with_the_definition() {
    for isa in isas() {
        let cpu = cpu(isa, 2);
        for (exact, shape) in [
            (ExactType::F32, heads(4, 4, 64)),
            (ExactType::Bf16, heads(2, 1, 80)),
            (ExactType::F32, heads(4, 1, 96)),
            (ExactType::Bf16, heads(8, 1, 128)),
            (ExactType::Bf16, heads(4, 2, 64)),
            (ExactType::F32, heads(2, 2, 20)),
        ] {
            // (positions before, queries): nothing before, one token, tails, exactly a page, over a span.
            for (before, n) in [(0, 1), (0, 63), (0, 64), (0, 65), (63, 1), (64, 1), (62, 3), (127, 1), (100, 30), (1024, 1), (1025, 40)] {
                let cache = &mut Cache::new(exact, shape, None);
                let mut seq = Sequence::default();
                cache.extend(&mut seq, before + n);
                let q = cache.queries(n);
                let want = cache.attend(&Reference, &[(&seq, n)], &q);
                let got = cache.attend(&cpu, &[(&seq, n)], &q);
                assert_near(
                    &got,
                    &want,
                    1e-5,
                    format_args!("{isa} {exact:?} {shape:?} {before}+{n}", shape = (shape.heads, shape.kv_heads, shape.head_dim)),
                );
            }
        }
    }
}

#[test]
fn exact_attention_is_the_same_in_chunks_in_batches_and_on_any_threads() {
    for isa in isas() {
        let machines = [cpu(isa, 1), cpu(isa, 2), cpu(isa, 8)];
        for (exact, shape) in [
            (ExactType::F32, heads(1, 1, 64)),
            (ExactType::Bf16, heads(4, 2, 80)),
            (ExactType::Bf16, heads(4, 1, 128)),
            (ExactType::Bf16, heads(8, 1, 64)),
        ] {
            let cache = &mut Cache::new(exact, shape, None);
            let width = shape.heads * shape.head_dim;
            let (mut seq, mut other) = (Sequence::default(), Sequence::default());
            cache.extend(&mut seq, 1100);
            cache.extend(&mut other, 70);
            let cut = |len: usize| Sequence { len, exact: seq.exact[..len.div_ceil(64)].to_vec(), ..seq.clone() };
            // From nothing, and across the end of the first span.
            for (start, n) in [(0, 130), (960, 140)] {
                let q = cache.queries(n);
                let whole = cache.attend(&machines[0], &[(&cut(start + n), n)], &q);
                for cpu in &machines[1..] {
                    assert_same(&cache.attend(cpu, &[(&cut(start + n), n)], &q), &whole, format_args!("{isa} {}", cpu.describe()));
                }
                // Pieces: the same pages, fewer positions.
                let mut at = 0;
                for (i, piece) in [1, 2, 61, 1, 64].into_iter().cycle().enumerate() {
                    let piece = piece.min(n - at);
                    if piece == 0 {
                        break;
                    }
                    let got = cache.attend(&machines[i % 3], &[(&cut(start + at + piece), piece)], &q[at * width..][..piece * width]);
                    assert_same(&got, &whole[at * width..][..piece * width], format_args!("{isa} {exact:?}, {piece} from {start}+{at}"));
                    at += piece;
                }
                // One token around the ends of pages and spans, alone and beside another sequence.
                for at in [0, 1, 62, 63, 64, 65, 127, 128, n - 1] {
                    let (part, mine) = (cut(start + at + 1), &q[at * width..][..width]);
                    let want = &whole[at * width..][..width];
                    for cpu in &machines {
                        assert_same(&cache.attend(cpu, &[(&part, 1)], mine), want, format_args!("{isa} {exact:?}, token {start}+{at}"));
                    }
                    let both = [&q[..3 * width], mine].concat();
                    let got = cache.attend(&machines[1], &[(&other, 3), (&part, 1)], &both);
                    assert_same(&got[3 * width..], want, format_args!("{isa} {exact:?}, token {start}+{at} in a batch"));
                }
            }
        }
    }
}

#[test]
fn what_lies_after_a_position_cannot_reach_it() {
    for isa in isas() {
        let cpu = cpu(isa, 1);
        for exact in [ExactType::F32, ExactType::Bf16] {
            let shape = heads(2, 1, 64);
            let cache = &mut Cache::new(exact, shape, None);
            let mut seq = Sequence::default();
            cache.extend(&mut seq, 40);
            let q = cache.queries(80);
            let alone = cache.attend(&cpu, &[(&seq, 40)], &q[..40 * 128]);
            // Forty more positions, whose values overflow in every product.
            cache.extend(&mut seq, 40);
            for slot in 40..64 {
                let at = LAYER * cache.layout.exact_layer_bytes() + (64 + slot) * 64 * exact.bytes();
                cache.arena.slice_mut::<u8>(seq.exact[0], at, 64 * exact.bytes()).fill(0xff);
            }
            let both = cache.attend(&cpu, &[(&seq, 80)], &q);
            assert_same(&both[..40 * 128], &alone, format_args!("{isa} {exact:?}"));
            assert!(both[40 * 128..].iter().any(|v| v.is_nan()), "the poison was there");
        }
    }
}

fn cskv(bits: u32, sinks: u32, basis: BasisKind) -> Cskv {
    Cskv::shares((0.3, 0.45), bits, (64, sinks), basis)
}

/// By the Hadamard quantiser, for keys, values, or both.
pub(crate) fn turned(bits: u32, sinks: u32, basis: BasisKind, [keys, values]: [bool; 2]) -> Cskv {
    let quantiser = |turned| if turned { Quantiser::Hadamard } else { Quantiser::Affine };
    Cskv { key_quantiser: quantiser(keys), value_quantiser: quantiser(values), ..cskv(bits, sinks, basis) }
}

/// Budgets of this test stand for layers that keep nothing of their keys (odd) or of their values (even), and little of the others.
fn thin(profile: &Cskv) -> Option<Widths> {
    let Size::Budget(which) = profile.size else { return None };
    let (none, some) = (Width { rank: 0, bits: 4 }, Width { rank: 12, bits: 3 });
    Some(if which % 2 == 1 { Widths { keys: none, values: some } } else { Widths { keys: some, values: none } })
}

/// Profiles by bits, sinks, basis, element and shape.
fn compressed() -> Vec<(Cskv, ExactType, Heads)> {
    let mut all = Vec::new();
    for bits in [16, 8, 4, 3, 2] {
        all.push((cskv(bits, 0, BasisKind::Joint), ExactType::F32, heads(4, 2, 64)));
        all.push((cskv(bits, 4, BasisKind::Grouped(1)), ExactType::Bf16, heads(4, 2, 80)));
        all.push((cskv(bits, 17, BasisKind::Grouped(2)), ExactType::F32, heads(8, 4, 20)));
        all.push((cskv(bits, 4, BasisKind::Frequency), ExactType::Bf16, heads(8, 2, 64)));
        all.push((cskv(bits, 0, BasisKind::Frequency), ExactType::F32, heads(3, 3, 80)));
        all.push((cskv(bits, 17, BasisKind::Frequency), ExactType::F32, heads(6, 1, 20)));
        all.push((cskv(bits, 4, BasisKind::Identity), ExactType::F32, heads(4, 2, 32)));
    }
    for bits in [4, 3, 2] {
        for parts in [[true, true], [false, true], [true, false]] {
            all.push((turned(bits, 4, BasisKind::Joint, parts), ExactType::F32, heads(4, 2, 64)));
            all.push((turned(bits, 17, BasisKind::Grouped(2), parts), ExactType::F32, heads(8, 4, 20)));
            all.push((turned(bits, 4, BasisKind::Frequency, parts), ExactType::Bf16, heads(8, 2, 64)));
            all.push((turned(bits, 0, BasisKind::Frequency, parts), ExactType::F32, heads(3, 3, 80)));
            all.push((turned(bits, 5, BasisKind::Identity, parts), ExactType::F32, heads(4, 2, 32)));
            // Heads whose codes do not fill whole words.
            all.push((turned(bits, 5, BasisKind::Identity, parts), ExactType::F32, heads(6, 3, 20)));
        }
    }
    all.push((cskv(16, 4, BasisKind::Dropped), ExactType::F32, heads(4, 2, 32)));
    for which in [1, 2] {
        for basis in [BasisKind::Joint, BasisKind::Frequency] {
            for turn in [false, true] {
                all.push((Cskv { size: Size::Budget(which), ..turned(4, 4, basis, [turn; 2]) }, ExactType::F32, heads(4, 2, 32)));
            }
        }
    }
    all
}

#[test]
fn sealed_bytes_are_those_of_the_definition_but_for_ties() {
    for isa in isas() {
        for (profile, exact, shape) in compressed() {
            let seal = |ops: &dyn Ops| {
                let mut cache = Cache::new(exact, shape, Some(profile.clone()));
                let mut seq = Sequence::default();
                cache.extend(&mut seq, 200);
                cache.seal(ops, &mut seq, 2);
                (cache, seq)
            };
            let (mine, seq) = seal(&cpu(isa, 2));
            let (theirs, same) = seal(&Reference);
            assert_eq!(seq.sealed, same.sealed);
            let layer = mine.layout.sealed[LAYER];
            let mut off = 0;
            let mut all = 0;
            for &page in &seq.sealed {
                let halves = |cache: &Cache, at, n| cache.arena.slice::<f16>(page, at, n).iter().map(|v| v.to_f32()).collect::<Vec<_>>();
                let (keys, values) = (layer.keys, layer.values);
                let (k, v) = (keys.rank, values.rank);
                if keys.bits == 16 {
                    for (at, n) in [(keys.codes, k * 64), (values.codes, 64 * v)] {
                        assert_near(&halves(&mine, at, n), &halves(&theirs, at, n), 1e-3, format_args!("{isa} {profile:?}"));
                    }
                    continue;
                }
                for (at, n) in [(keys.meta, layer.key_meta_bytes() / 2), (values.meta, layer.value_meta_bytes() / 2)] {
                    assert_near(&halves(&mine, at, n), &halves(&theirs, at, n), 1e-3, format_args!("{isa} {profile:?} scales"));
                }
                let sections = [
                    (keys.codes, keys.key_code_bytes(), (k, keys.bits, Order::Runs), 64),
                    (values.codes, values.value_code_bytes(), (64, values.bits, Order::Strided), v),
                ];
                for (at, bytes, form @ (n, ..), lanes) in sections {
                    for i in 0..n {
                        let read = |cache: &Cache| {
                            let mut out = vec![0; lanes];
                            get(cache.arena.slice(page, at, bytes / 4), form, i, &mut out);
                            out
                        };
                        for (a, b) in read(&mine).into_iter().zip(read(&theirs)) {
                            assert!(a.abs_diff(b) <= 1, "{isa} {profile:?}: code {a}, not {b}");
                            all += 1;
                            off += usize::from(a != b);
                        }
                    }
                }
            }
            assert!(off * 200 <= all, "{isa} {profile:?}: {off} of {all} codes differ");
        }
    }
}

#[test]
fn a_reader_of_pages_sees_what_calibration_says_it_does() {
    let shape = heads(4, 2, 32);
    for bits in [16, 8, 4, 3, 2] {
        for turn in if bits > 4 { &[false][..] } else { &[false, true] } {
            let profile = turned(bits, 5, BasisKind::Identity, [*turn; 2]);
            let mut cache = Cache::new(ExactType::F32, shape, Some(profile.clone()));
            let mut seq = Sequence::default();
            cache.extend(&mut seq, 64);
            let layer = cache.layout.sealed[LAYER];
            let exact = cache.arena.slice::<f32>(seq.exact[0], LAYER * cache.layout.exact_layer_bytes(), 2 * 2 * 32 * 64).to_vec();
            let (Some(maps), width) = (cache.compression.clone(), 64) else { unreachable!() };
            let KeyMap::Frequencies(map) = &maps.keys else { panic!("an identity") };
            let head = |p: usize, h: usize, values: usize| {
                let tile = &exact[(2 * h + values) * 32 * 64..][..32 * 64];
                (0..32).map(|c| if values == 1 { tile[p * 32 + c] } else { tile[c * 64 + p] }).collect::<Vec<_>>()
            };
            let row = |p: usize, values: usize| [head(p, 0, values), head(p, 1, values)].concat();
            let mut keys: Vec<f32> = (0..64).flat_map(|p| map.latent(&row(p, 0))).collect();
            // Projections of the identity take latents as they are, but for the rotation folded into them.
            let mut values: Vec<f32> = (0..64)
                .flat_map(|p| {
                    let x = row(p, 1);
                    let group = |g: &Group| (0..32).map(|r| (0..32).map(|c| x[g.channels.start + c] * g.down[c * 32 + r]).sum()).collect();
                    maps.values.groups.iter().flat_map(|g| -> Vec<f32> { group(g) }).collect::<Vec<_>>()
                })
                .collect();
            let coding = |part: SealedPart| Coding { width: Width { rank: width, bits }, quantiser: part.quantiser, blocks: layer.blocks };
            seen::keys(&mut keys, coding(layer.keys), 0, 5);
            seen::values(&mut values, coding(layer.values));
            cache.seal(&Reference, &mut seq, 1);
            // Attention of one query that meets one position alone gives its value; read through the definition instead, position by
            // position: the page must hold the same numbers.
            let page = seq.sealed[0];
            let read = |part: SealedPart, values: bool, p: usize, r: usize| -> f32 {
                if bits == 16 {
                    let at = if values { p * width + r } else { r * 64 + p };
                    return cache.arena.slice::<f16>(page, part.codes + 2 * at, 1)[0].to_f32();
                }
                let (form, lanes, i, lane, bytes) = match values {
                    true => ((64, bits, Order::Strided), width, p, r, part.value_code_bytes()),
                    false => ((width, bits, Order::Runs), 64, r, p, part.key_code_bytes()),
                };
                let mut codes = vec![0; lanes];
                get(cache.arena.slice(page, part.codes, bytes / 4), form, i, &mut codes);
                let meta = |i: usize| cache.arena.slice::<f16>(page, part.meta + 2 * i, 1)[0].to_f32();
                let code = codes[lane];
                match (part.quantiser, values) {
                    (Quantiser::Hadamard, _) => {
                        let (levels, unit) = levels(bits);
                        meta(r / 32 * 64 + p) / unit * f32::from(levels[code as usize])
                    }
                    (Quantiser::Affine, false) => meta(width + r) + f32::from(code) * meta(r),
                    (Quantiser::Affine, true) => {
                        let groups = layer.value_groups();
                        meta((groups + r / 32) * 64 + p) + f32::from(code) * meta(r / 32 * 64 + p)
                    }
                }
            };
            for p in 5..64 {
                for r in 0..width {
                    for (part, values, want) in [(layer.keys, false, keys[p * width + r]), (layer.values, true, values[p * width + r])] {
                        let got = read(part, values, p, r);
                        assert!((got - want).abs() <= 1e-3 * (1.0 + want.abs()), "{profile:?} values {values}, {p}.{r}: {got} for {want}");
                    }
                }
            }
        }
    }
}

#[test]
fn attention_over_sealed_pages_agrees_with_the_definition() {
    for isa in isas() {
        let cpu = cpu(isa, 2);
        for (profile, exact, shape) in compressed() {
            let cache = &mut Cache::new(exact, shape, Some(profile.clone()));
            let mut seq = Sequence::default();
            cache.extend(&mut seq, 3 * 64 + 10);
            cache.seal(&cpu, &mut seq, 2);
            for n in [1, 10, 64] {
                let q = cache.queries(n);
                let want = cache.attend(&Reference, &[(&seq, n)], &q);
                let got = cache.attend(&cpu, &[(&seq, n)], &q);
                // Products of codes have weights of 16 bits, or of 8 where codes are of normal latents: then an element may be off
                // by some, but not all of them.
                let wide = matches!(profile.size, Size::Shares { key_bits: 16, .. });
                let coded = matches!(profile.basis, BasisKind::Frequency | BasisKind::Identity) && !wide;
                let bytes = coded && [profile.key_quantiser, profile.value_quantiser].contains(&Quantiser::Hadamard);
                let tolerance = if bytes {
                    6e-2
                } else if coded {
                    1e-3
                } else {
                    1e-5
                };
                if bytes {
                    let square = |x: f32| f64::from(x).powi(2);
                    let off: f64 = got.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
                    let all: f64 = want.iter().map(|&x| square(x)).sum();
                    assert!(off.sqrt() <= 2e-2 * all.sqrt(), "{isa} {exact:?} {profile:?}, {n} queries: {off:e} of {all:e}");
                }
                assert_near(&got, &want, tolerance, format_args!("{isa} {exact:?} {profile:?}, {n} queries"));
            }
        }
    }
}

#[test]
fn groups_and_spans_of_pages_agree_with_the_definition() {
    // Two spans and a part of a group; maxima that move from group to group.
    const PAGES: usize = 16 + 2 * 4 + 2;
    let sinks = |cskv: Cskv, sinks| Cskv { sinks, ..cskv };
    let mixed = |keys, values| turned(4, 4, BasisKind::Frequency, [keys, values]);
    for (profile, tolerance) in [
        (cskv(16, 4, BasisKind::Frequency), 1e-5),
        (cskv(8, 4, BasisKind::Frequency), 1e-3),
        (mixed(false, false), 1e-3),
        (mixed(false, true), 6e-2),
        (mixed(true, false), 6e-2),
        (mixed(true, true), 6e-2),
        // The sinks are all of the first page.
        (sinks(mixed(false, false), 64), 1e-3),
        (sinks(mixed(true, true), 64), 6e-2),
    ] {
        let cache = &mut Cache::new(ExactType::F32, heads(4, 2, 32), Some(profile.clone()));
        let mut seq = Sequence::default();
        cache.extend(&mut seq, PAGES * 64 + 70);
        for (sealed, n) in [(1, 3), (PAGES - 1, 3)] {
            cache.seal(&Reference, &mut seq, sealed);
            let q: Vec<f32> = cache.queries(n).iter().map(|x| 2.0 * x).collect();
            let want = cache.attend(&Reference, &[(&seq, n)], &q);
            for isa in isas() {
                let got = cache.attend(&cpu(isa, 2), &[(&seq, n)], &q);
                assert_near(&got, &want, tolerance, format_args!("{isa} {profile:?}, {sealed} pages"));
                let square = |x: f32| f64::from(x).powi(2);
                let off: f64 = got.iter().zip(&want).map(|(a, b)| square(a - b)).sum();
                let all: f64 = want.iter().map(|&x| square(x)).sum();
                assert!(off.sqrt() <= 0.4 * f64::from(tolerance) * all.sqrt(), "{isa} {profile:?}, {sealed} pages: {off:e} of {all:e}");
            }
        }
    }
}

#[test]
fn what_products_of_bytes_round_is_little_beside_what_the_codes_do() {
    let shape = heads(8, 4, 64);
    for isa in isas() {
        let cpu = cpu(isa, 2);
        // The same numbers, kept in 16 bits and in few.
        let attend = |bits: u32, ops: &dyn Ops| {
            let cache = &mut Cache::new(ExactType::F32, shape, Some(turned(bits, 4, BasisKind::Identity, [bits < 16; 2])));
            let mut seq = Sequence::default();
            cache.extend(&mut seq, 12 * 64 + 10);
            cache.seal(&Reference, &mut seq, 11);
            // Queries of another size make attention flat, or heed few positions.
            let q: Vec<f32> = cache
                .queries(64)
                .chunks(8 * 64)
                .zip([0.1, 1.0, 4.0, 10.0].iter().cycle())
                .flat_map(|(q, f)| q.iter().map(move |x| x * f))
                .collect();
            cache.attend(ops, &[(&seq, 64)], &q)
        };
        let exact = attend(16, &Reference);
        let rms = |a: &[f32], b: &[f32]| (a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() / a.len() as f64).sqrt();
        for bits in [4, 3, 2] {
            let coded = attend(bits, &Reference);
            let got = attend(bits, &cpu);
            for (i, factor) in [0.1, 1.0, 4.0, 10.0].into_iter().enumerate() {
                let of = |x: &[f32]| x.chunks(8 * 64).skip(i).step_by(4).flatten().copied().collect::<Vec<f32>>();
                let (codes, products) = (rms(&of(&coded), &of(&exact)), rms(&of(&got), &of(&coded)));
                assert!(products < 0.1 * codes, "{isa} {bits} bits, queries x{factor}: products round {products:e}, codes {codes:e}");
            }
        }
    }
}

#[test]
fn sealed_attention_is_the_same_in_chunks_in_batches_and_on_any_threads() {
    for isa in isas() {
        let machines = [cpu(isa, 1), cpu(isa, 2), cpu(isa, 8)];
        for (profile, exact, shape) in [
            (cskv(4, 4, BasisKind::Joint), ExactType::Bf16, heads(4, 2, 64)),
            (cskv(16, 0, BasisKind::Grouped(1)), ExactType::F32, heads(3, 3, 32)),
            (cskv(4, 4, BasisKind::Frequency), ExactType::Bf16, heads(4, 2, 64)),
            (cskv(3, 0, BasisKind::Frequency), ExactType::F32, heads(5, 5, 32)),
            (cskv(16, 4, BasisKind::Frequency), ExactType::Bf16, heads(8, 1, 64)),
            (turned(4, 4, BasisKind::Frequency, [true, true]), ExactType::Bf16, heads(4, 2, 64)),
            (turned(3, 0, BasisKind::Joint, [true, true]), ExactType::F32, heads(5, 5, 32)),
            (turned(2, 4, BasisKind::Identity, [true, true]), ExactType::Bf16, heads(4, 2, 64)),
            (cskv(16, 4, BasisKind::Dropped), ExactType::Bf16, heads(4, 2, 64)),
        ] {
            let cache = &mut Cache::new(exact, shape, Some(profile));
            let width = shape.heads * shape.head_dim;
            let mut seq = Sequence::default();
            // Sealed pages end within the second span.
            cache.extend(&mut seq, 18 * 64);
            cache.seal(&machines[0], &mut seq, 1);
            cache.seal(&machines[1], &mut seq, 17);
            let n = 100;
            cache.extend(&mut seq, n);
            let q = cache.queries(n);
            let whole = cache.attend(&machines[0], &[(&seq, n)], &q);
            for cpu in &machines[1..] {
                assert_same(&cache.attend(cpu, &[(&seq, n)], &q), &whole, format_args!("{isa} {}", cpu.describe()));
            }
            for (i, at) in [0, 1, 5, 63, 64, 98, 99].into_iter().enumerate() {
                let mut part = seq.clone();
                part.len = seq.len - n + at + 1;
                let got = cache.attend(&machines[i % 3], &[(&part, 1)], &q[at * width..][..width]);
                assert_same(&got, &whole[at * width..][..width], format_args!("{isa} token {at}"));
            }
        }
    }
}

#[test]
fn broken_calls_are_refused() {
    let cpu = Cpu::new(1);
    let cache = &mut Cache::new(ExactType::F32, heads(2, 1, 16), None);
    let mut seq = Sequence::default();
    cache.extend(&mut seq, 65);
    let q = cache.queries(2);
    let w = [0.0; 6];
    let message = |f: &mut dyn FnMut()| {
        let panic = catch_unwind(AssertUnwindSafe(f)).expect_err("refused");
        panic.downcast::<String>().map_or_else(|p| p.downcast::<&str>().unwrap().to_string(), |s| *s)
    };
    let linear = |y: &mut [f32], out| {
        let w = Matrix { out_features: out, in_features: 3, data: MatrixData::F32(&w) };
        cpu.linear(&[1.0; 3], 1, &mut [Linear { w, inner: None, bias: None, accumulate: false, y }]);
    };
    assert!(message(&mut || linear(&mut [0.0; 2], 3)).contains("weights are not [out][in]"));
    assert!(message(&mut || linear(&mut [0.0; 3], 2)).contains("y is not [rows][out]"));
    let mut short = seq.clone();
    short.exact.truncate(1);
    assert!(message(&mut || drop(cache.attend(&cpu, &[(&short, 1)], &q[..32]))).contains("too few exact pages"));
    assert!(message(&mut || drop(cache.attend(&cpu, &[(&seq, 2)], &q[..32]))).contains("rows beyond q"));
    assert!(Cpu::with_isa(Isa::Portable, 1).is_ok());
}
