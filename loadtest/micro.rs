//! How near the kernels of the host backend come to what the machine can do: `cargo bench --bench micro [word ...]`
//! prints the tables whose title contains one of the words (all without words); a word `row=TEXT` leaves of the table `sealed` the
//! rows that contain the text.
//!
//! Reading kernels are judged by a plain summing loop over as many bytes, arithmetic ones by multiply-adds that
//! never leave the registers. Each number is the best of many runs: on a shared machine the rest is noise.

use std::time::{Duration, Instant};

use half::bf16;
use strait::compress::{FrequencyMap, Group, KeyMap, LayerCompression, Projection};
use strait::ids::PageAddr;
use strait::kv::Arena;
use strait::kv::layout::{BasisKind, Cskv, ExactType, PageLayout, Profile, Quantiser};
use strait::model::config::{ModelConfig, Rope, RopeScaling};
use strait::ops::cpu::Cpu;
use strait::ops::{AttendRow, Heads, LayerView, Linear, Matrix, MatrixData, Ops, RopeTable, SealJob};

/// Prints a table of a backend, given its peak in FLOP/s.
type Table = fn(&Cpu, f64);

fn main() {
    // `cargo bench` adds a `--bench` of its own.
    let words: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench" && !a.starts_with("row=")).collect();
    let wanted = |title: &str| words.is_empty() || words.iter().any(|w| title.contains(w.as_str()));
    for threads in [1, 2] {
        let cpu = Cpu::new(threads);
        let peak = cpu.peak_flops();
        println!("{}: {:.0} GFLOP/s, memory {:.1} GB/s\n", cpu.describe(), peak / 1e9, cpu.read_bandwidth(1 << 29) / 1e9);
        let tables: [(&str, Table); 7] = [
            ("calls", calls),
            ("gemv", gemv),
            ("rows", few_rows),
            ("gemm", gemm),
            ("decode", decode),
            ("prefill", prefill),
            ("sealed", sealed),
        ];
        for (title, table) in tables {
            if wanted(title) {
                println!("{title}");
                table(&cpu, peak);
                println!();
            }
        }
    }
}

/// Seconds of the quickest run.
fn best(mut f: impl FnMut()) -> f64 {
    let start = Instant::now();
    let (mut best, mut runs) = (f64::INFINITY, 0);
    while start.elapsed() < Duration::from_millis(400) || runs < 3 {
        let one = Instant::now();
        f();
        best = best.min(one.elapsed().as_secs_f64());
        runs += 1;
    }
    best
}

fn numbers(n: usize) -> Vec<f32> {
    let mut x = 1u32;
    let next = || {
        x = x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (x >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn halves(n: usize) -> Vec<bf16> {
    numbers(n).into_iter().map(bf16::from_f32).collect()
}

fn linear(cpu: &Cpu, w: &[bf16], x: &[f32], rows: usize, y: &mut [f32]) {
    let (inputs, out) = (x.len() / rows, y.len() / rows);
    let w = Matrix { out_features: out, in_features: inputs, data: MatrixData::Bf16(w) };
    cpu.linear(x, rows, &mut [Linear { w, inner: None, bias: None, accumulate: false, y }]);
}

/// What a call costs when there is next to nothing to do, and when it enters a parallel region.
fn calls(cpu: &Cpu, _: f64) {
    for (out, inputs) in [(8, 64), (128, 128), (256, 256), (512, 256), (512, 512), (1024, 1024)] {
        let (w, x, mut y) = (halves(out * inputs), numbers(inputs), vec![0.0; out]);
        let seconds = best(|| {
            for _ in 0..100 {
                linear(cpu, &w, &x, 1, &mut y);
            }
        }) / 100.0;
        println!("  {out:>6} x {inputs:<6} bf16, 1 row   {:>8.2} us   {:>6.1} GB/s", seconds * 1e6, 2e-9 * w.len() as f64 / seconds);
    }
}

const SHAPES: [(usize, usize); 4] = [(2048, 2048), (2048, 8192), (8192, 2048), (128_256, 2048)];

fn gemv(cpu: &Cpu, _: f64) {
    for (out, inputs) in SHAPES {
        let (w, x, mut y) = (halves(out * inputs), numbers(inputs), vec![0.0; out]);
        let rate = 2.0 * w.len() as f64 / best(|| linear(cpu, &w, &x, 1, &mut y));
        let bandwidth = cpu.read_bandwidth(2 * w.len());
        println!("  {out:>6} x {inputs:<6} bf16   {:>7.1} GB/s   {:>4.0} % of reading as much", rate / 1e9, 100.0 * rate / bandwidth);
    }
}

fn few_rows(cpu: &Cpu, _: f64) {
    // Weights that a third-level cache may hold, and such as no cache does.
    for (out, inputs) in [(8192, 2048), (2048, 8192), (65536, 2048)] {
        let w = halves(out * inputs);
        let bandwidth = cpu.read_bandwidth(2 * w.len());
        for rows in [1, 2, 3, 4, 6, 8, 12, 13, 16, 24, 32, 48] {
            let (x, mut y) = (numbers(rows * inputs), vec![0.0; rows * out]);
            let seconds = best(|| linear(cpu, &w, &x, rows, &mut y));
            println!(
                "  {out:>6} x {inputs:<6} bf16, {rows:>2} rows   {:>6.2} ms   {:>6.1} GB/s ({:>3.0} %)   {:>6.0} GFLOP/s",
                seconds * 1e3,
                2e-9 * w.len() as f64 / seconds,
                200.0 * w.len() as f64 / seconds / bandwidth,
                2e-9 * (w.len() * rows) as f64 / seconds
            );
        }
    }
}

fn gemm(cpu: &Cpu, peak: f64) {
    let rows = 512;
    for (out, inputs) in &SHAPES[..3] {
        let (w, x, mut y) = (halves(out * inputs), numbers(rows * inputs), vec![0.0; rows * out]);
        let rate = 2.0 * (w.len() * rows) as f64 / best(|| linear(cpu, &w, &x, rows, &mut y));
        println!("  {out:>6} x {inputs:<6} bf16, {rows} rows   {:>6.0} GFLOP/s   {:>4.0} % of peak", rate / 1e9, 100.0 * rate / peak);
    }
}

/// One layer of a model.
fn model(heads: usize, kv_heads: usize, head_dim: usize, tokens: usize) -> ModelConfig {
    ModelConfig {
        family: "llama".into(),
        hidden: 64,
        layers: 1,
        heads,
        kv_heads,
        head_dim,
        intermediate: 64,
        vocab: 64,
        max_positions: tokens + 64,
        norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        qkv_bias: false,
        output_bias: false,
        mlp_bias: false,
        qk_norm: false,
        tied: true,
    }
}

/// An arena with `tokens` positions of one layer, pages in no order.
struct Cache {
    arena: Arena,
    layout: PageLayout,
    pages: Vec<PageAddr>,
    shape: Heads,
    table: RopeTable,
}

impl Cache {
    fn new(heads: usize, kv_heads: usize, head_dim: usize, tokens: usize, cskv: Option<Cskv>) -> Cache {
        let shape = Heads { heads, kv_heads, head_dim, scale: (head_dim as f32).powf(-0.5) };
        let layout = PageLayout::new(&model(heads, kv_heads, head_dim, tokens), ExactType::Bf16, &Profile { name: "p".into(), cskv }, None);
        let sizes = layout.sizes();
        let (each, n) = (sizes.exact.max(sizes.sealed), tokens.div_ceil(64) + 1);
        let mut arena = Arena::new(each * n as u64).expect("memory for the cache");
        let values = halves(layout.exact_layer_bytes() / 2);
        // An odd stride visits every page once, far from its neighbours.
        let stride = (n / 2) | 1;
        let stride = (stride..).step_by(2).find(|s| gcd(*s, n) == 1).expect("some stride is coprime");
        let pages: Vec<PageAddr> = (0..n).map(|i| PageAddr(((i * stride % n) as u64 * each / PageAddr::UNIT) as u32)).collect();
        for &page in &pages {
            arena.slice_mut::<bf16>(page, 0, values.len()).copy_from_slice(&values);
        }
        let half = head_dim / 2;
        let angle = |i: usize| (i / half) as f32 * 10_000f32.powf(-((i % half) as f32) / half as f32);
        let positions = tokens + 64;
        let table = RopeTable {
            half,
            cos: (0..positions * half).map(|i| angle(i).cos()).collect(),
            sin: (0..positions * half).map(|i| angle(i).sin()).collect(),
        };
        Cache { arena, layout, pages, shape, table }
    }

    fn row<'a>(&'a self, compression: Option<&'a LayerCompression>, sealed: usize, position: usize, n: usize) -> AttendRow<'a> {
        AttendRow {
            view: LayerView { layer: 0, layout: &self.layout, compression },
            first: 0,
            n,
            position: position as u32,
            sealed: &self.pages[..sealed],
            sinks: None,
            exact: &self.pages[sealed..],
            exact_offset: 0,
        }
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn decode(cpu: &Cpu, _: f64) {
    for (heads, kv_heads, d) in [(8, 8, 64), (32, 8, 64), (8, 8, 128), (32, 8, 128)] {
        for tokens in [1024, 4096, 16_384, 32_768] {
            let cache = Cache::new(heads, kv_heads, d, tokens, None);
            let (q, mut out) = (numbers(heads * d), vec![0.0; heads * d]);
            let row = cache.row(None, 0, tokens - 1, 1);
            let seconds = best(|| cpu.attend(&cache.arena, cache.shape, &cache.table, &[row], &q, &mut out));
            let bytes = 4 * tokens * kv_heads * d;
            let rate = bytes as f64 / seconds;
            println!(
                "  {heads:>2} heads on {kv_heads} of {d:>3}, {tokens:>6} tokens   {:>8.3} ms   {:>6.1} GB/s   {:>4.0} % of reading as much",
                seconds * 1e3,
                rate / 1e9,
                100.0 * rate / cpu.read_bandwidth(bytes)
            );
        }
    }
}

fn prefill(cpu: &Cpu, peak: f64) {
    let (n, depth) = (512, 4096);
    for (heads, kv_heads, d) in [(8, 8, 64), (32, 8, 64), (8, 8, 128), (32, 8, 128)] {
        let cache = Cache::new(heads, kv_heads, d, depth + n, None);
        let (q, mut out) = (numbers(n * heads * d), vec![0.0; n * heads * d]);
        let row = cache.row(None, 0, depth, n);
        let seconds = best(|| cpu.attend(&cache.arena, cache.shape, &cache.table, &[row], &q, &mut out));
        let products: usize = (0..n).map(|i| 2 * (depth + i + 1) * heads * d).sum();
        let rate = 2.0 * products as f64 / seconds;
        println!(
            "  {heads:>2} heads on {kv_heads} of {d:>3}, {n} queries after {depth}   {:>8.2} ms   {:>6.0} GFLOP/s   {:>4.0} % of peak",
            seconds * 1e3,
            rate / 1e9,
            100.0 * rate / peak
        );
    }
}

/// Sealing pages, and decoding over them, beside the same context exact.
fn sealed(cpu: &Cpu, _: f64) {
    for (heads, kv_heads, d, tokens) in [(32, 8, 64, 4096), (32, 8, 64, 32768), (16, 16, 64, 32768)] {
        for (share, bits, basis, quantiser) in [
            (0.2, 16, BasisKind::Joint),
            (0.2, 4, BasisKind::Joint),
            (0.2, 4, BasisKind::Grouped(1)),
            (0.35, 16, BasisKind::Frequency),
            (0.35, 8, BasisKind::Frequency),
            (0.35, 4, BasisKind::Frequency),
            (0.2, 4, BasisKind::Frequency),
            (0.35, 3, BasisKind::Frequency),
            (0.35, 2, BasisKind::Frequency),
        ]
        .into_iter()
        .flat_map(|(share, bits, basis)| {
            let turned = if bits <= 4 { &[Quantiser::Affine, Quantiser::Hadamard][..] } else { &[Quantiser::Affine] };
            turned.iter().map(move |&quantiser| (share, bits, basis, quantiser))
        }) {
            // Rebuilt keys of long contexts take the tool's patience.
            if tokens > 4096 && basis != BasisKind::Frequency {
                continue;
            }
            let cskv = Cskv { key_quantiser: quantiser, value_quantiser: quantiser, ..Cskv::shares((share, share), bits, (64, 0), basis) };
            let widths = PageLayout::new(
                &model(heads, kv_heads, d, 64),
                ExactType::Bf16,
                &Profile { name: "p".into(), cskv: Some(cskv.clone()) },
                None,
            )
            .sealed[0];
            let label = format!(
                "{heads} heads on {kv_heads} of {d}, ranks {} and {}, {bits:>2} bits {quantiser:?}, {basis:?}, {tokens} tokens",
                widths.keys.rank, widths.values.rank
            );
            if std::env::args().any(|a| a.strip_prefix("row=").is_some_and(|row| !label.contains(row))) {
                continue;
            }
            let per_group = basis.heads_per_group(kv_heads);
            let mut cache = Cache::new(heads, kv_heads, d, tokens + 128, Some(cskv.clone()));
            let side = |rank: usize| {
                let (channels, ranks) = (per_group * d, rank / (kv_heads / per_group));
                let groups = (0..kv_heads / per_group).map(|g| Group {
                    channels: g * channels..(g + 1) * channels,
                    ranks: g * ranks..(g + 1) * ranks,
                    down: numbers(channels * ranks),
                    up: numbers(channels * ranks),
                });
                Projection { mean: numbers(kv_heads * d), groups: groups.collect() }
            };
            let layer = cache.layout.sealed[0];
            let (pairs, pair) = (layer.keys.rank / 2, |x: &[f32]| x.as_chunks::<2>().0.to_vec());
            let keys = match basis {
                BasisKind::Frequency => KeyMap::Frequencies(FrequencyMap {
                    kv_heads,
                    half: d / 2,
                    frequencies: (0..pairs as u32).map(|j| j % (d as u32 / 2)).collect(),
                    down: pair(&numbers(2 * pairs * kv_heads)),
                    up: pair(&numbers(2 * pairs * kv_heads)),
                    rotation: None,
                }),
                _ => KeyMap::Channels(side(layer.keys.rank)),
            };
            let compression = LayerCompression { keys, values: side(layer.values.rank) }.for_quantisers(&cskv);
            let pages = tokens / 64;
            let from = cache.pages[pages];
            let jobs: Vec<SealJob> =
                (0..pages).map(|i| SealJob { from, from_offset: 0, to: cache.pages[i], skip: 0, position: 64 * i as u32 }).collect();
            let seal = best(|| {
                let view = LayerView { layer: 0, layout: &cache.layout, compression: Some(&compression) };
                cpu.seal(&mut cache.arena, view, &cache.table, &jobs);
            });
            let (q, mut out) = (numbers(heads * d), vec![0.0; heads * d]);
            let row = cache.row(Some(&compression), pages, tokens + 10, 1);
            let decode = best(|| cpu.attend(&cache.arena, cache.shape, &cache.table, &[row], &q, &mut out));
            let bytes = layer.bytes() * pages;
            let products = heads * (layer.keys.rank + layer.values.rank) * tokens;
            println!(
                "  {label}   seal {:>7.1} us a page   decode {:>7.2} ms, {:>6.2} us a page, {:>5.2} GB/s, {:>5.1} G products/s",
                seal * 1e6 / pages as f64,
                decode * 1e3,
                decode * 1e6 / pages as f64,
                bytes as f64 / decode / 1e9,
                products as f64 / decode / 1e9,
            );
        }
    }
}
