//! Every table of every command, as it is seen at several widths. `MLX_QUANT_UPDATE=1 cargo test --workspace --test tables`
//! writes tests/snapshots anew; look at what changed.
#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

use std::collections::BTreeMap;
use std::path::Path;

use mlx_quant::compare::{Comparison, Entry, Keep, MadeOn, Rankings, Text};
use mlx_quant::device::{Adapter, Engines};
use mlx_quant::evaluate::{Against, Measures, SourceEvaluation, Subject};
use mlx_quant::forecast::{
    CardMemory, CardRates, Choice, Expected, Forecast, Machine, Peer, Recommendation, Row,
};
use mlx_quant::inspect::{Dimensions, Form, Inspection, Layer, Total};
use mlx_quant::plan::{LayerReport, PlanReport};
use mlx_quant::session::QuantizeMemory;
use mlx_quant::{Evaluation, Pick};
use mlx_quant_report::{self as report, EngineRow};

/// Where blocks begin, where columns leave, an ordinary terminal, and one with room.
const WIDTHS: [usize; 5] = [40, 60, 80, 120, 200];

/// Compares with the snapshots; nothing may be wider than the terminal but what is to be copied.
fn snapshot(name: &str, draw: impl Fn(usize) -> String) {
    // A path or command, whole.
    let copied = |line: &str| {
        ["model ", "run ", "make "].iter().any(|word| line.starts_with(word)) || !line.trim().contains(' ')
    };
    for width in WIDTHS {
        let drawn = draw(width);
        let wide = drawn.lines().filter(|line| line.chars().count() > width && !copied(line));
        assert_eq!(wide.collect::<Vec<_>>(), Vec::<&str>::new(), "{name} is wider than {width}:\n{drawn}");
        let file = format!("{name}-{width}.txt");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(&file);
        if std::env::var_os("MLX_QUANT_UPDATE").is_some() {
            std::fs::write(&path, format!("{drawn}\n")).unwrap();
        }
        let kept = std::fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(
            kept,
            format!("{drawn}\n"),
            "{file}; MLX_QUANT_UPDATE=1 cargo test --workspace --test tables"
        );
    }
}

fn against(windows: &[f64]) -> Against {
    let count = windows.len() as f64;
    let mean = windows.iter().sum::<f64>() / count;
    let error = (windows.iter().map(|kl| (kl - mean).powi(2)).sum::<f64>() / (count - 1.0) / count).sqrt();
    Against {
        reference_perplexity: 18.422,
        log_perplexity_difference: mean * 0.6,
        log_perplexity_difference_stderr: Some(error * 0.6),
        perplexity_ratio: (mean * 0.6).exp(),
        perplexity_ratio_stderr: Some((mean * 0.6).exp() * error * 0.6),
        kl_mean: mean,
        kl_stderr: Some(error),
        kl_p50: mean * 0.4,
        kl_p99: mean * 6.0,
        kl_p999: mean * 12.0,
        kl_max: mean * 30.0,
        top1: 0.8815,
        top1_stderr: Some(0.0073),
        kl_by_window: windows.to_vec(),
    }
}

fn measures(windows: &[f64]) -> Measures {
    let against = against(windows);
    Measures {
        windows: windows.len(),
        tokens: windows.len() * 511,
        perplexity: 18.422 * against.perplexity_ratio,
        perplexity_stderr: Some(3.5),
        against: Some(against),
    }
}

fn evaluation(total: Measures) -> Evaluation {
    let subject = Subject {
        model: "mlx_compare/models/dynamic+awq+gptq+dwq-4bit".to_owned(),
        reference: total.against.as_ref().map(|_| "demo model (built in)".to_owned()),
        bits_per_weight: 4.505,
        ..Subject::default()
    };
    Evaluation {
        subject,
        total,
        by_source: Vec::new(),
        sequence_length: 512,
        data_hash: "0123456789abcdef01".to_owned(),
        pick: Pick::EvenlySpaced { windows: 3 },
        sources: Vec::new(),
    }
}

fn entry(bits: u32, recipe: &str, seconds: f64, windows: &[f64]) -> Entry {
    let best = recipe == "dynamic+awq+gptq+dwq";
    Entry {
        name: if recipe == "rtn" { "basic" } else { recipe }.to_owned(),
        recipe: recipe.to_owned(),
        bits,
        group_size: 64,
        bits_per_weight: f64::from(bits) + 0.506,
        bytes: 4_447_232,
        seconds,
        resumed: recipe == "awq",
        peak_memory: (recipe != "gptq").then_some(972_000_000),
        made_on: MadeOn {
            processor: Some("Intel(R) Xeon(R) Processor @ 2.60GHz".to_owned()),
            threads: 2,
            engine: "avx512".to_owned(),
        },
        predicted_kl: None,
        evaluation: evaluation(measures(windows)),
        layers: Vec::new(),
        distilled: None,
        keep: Keep::Best,
        model: best.then(|| format!("mlx_compare/models/{recipe}-{bits}bit")),
    }
}

fn entries(bits: u32, factor: f64) -> Vec<Entry> {
    let of =
        |recipe, seconds, windows: [f64; 3]| entry(bits, recipe, seconds, &windows.map(|kl| kl * factor));
    vec![
        of("rtn", 0.02, [0.0939, 0.0876, 0.1002]),
        of("awq", 9.41, [0.0686, 0.0661, 0.0711]),
        of("gptq", 8.27, [0.0546, 0.0527, 0.0565]),
        of("dynamic", 89.4, [0.0440, 0.0422, 0.0458]),
        of("dwq", 3_672.0, [0.0538, 0.0532, 0.0560]),
        of("dynamic+awq+gptq+dwq", 231.0, [0.0415, 0.0399, 0.0431]),
    ]
}

fn comparison(entries: Vec<Entry>) -> Comparison {
    let text = Text {
        sequence_length: 512,
        windows: 3,
        pick: Pick::EvenlySpaced { windows: 3 },
        data_hash: "0123456789abcdef01".to_owned(),
        sources: Vec::new(),
    };
    Comparison {
        version: "1".to_owned(),
        model: "demo model (built in)".to_owned(),
        model_type: "llama".to_owned(),
        parameters: 7_938_304,
        model_bytes: 15_749_120,
        reference_perplexity: 18.422,
        kernels: "avx512".to_owned(),
        calibration: text.clone(),
        held_out: text,
        training: (0, 0),
        rankings: Rankings::of(&entries),
        entries,
        sensitivities: Vec::new(),
        predicted: Vec::new(),
        seconds: 1.0,
    }
}

fn commands(made: &Comparison) -> report::Commands {
    let run = |entry: &Entry| {
        entry
            .model
            .as_ref()
            .map(|model| format!("mlx_lm.generate --model {model} --prompt 'Tell me a story.'"))
    };
    report::Commands {
        make: made.entries.iter().map(|entry| format!("mlx-quant {}", entry.recipe)).collect(),
        run: made.entries.iter().map(run).collect(),
    }
}

#[test]
fn comparisons() {
    let one = comparison(entries(4, 1.0));
    snapshot("compare", |width| report::comparison_table(&one, &commands(&one), width));
    let two = comparison([entries(3, 4.0), entries(4, 1.0)].concat());
    snapshot("compare-two-widths", |width| report::comparison_table(&two, &commands(&two), width));
    let opens = report::comparison_table(&one, &commands(&one), 200);
    let first = "Take dynamic+awq+gptq+dwq: KL 0.0415 (very close to the original), 56 % below basic at the same size, \
                 231 s; next dynamic: KL 0.0440, 89.4 s\n";
    assert!(opens.starts_with(first), "{opens}");
    let markdown = report::comparison_markdown(&one, &commands(&one));
    assert!(
        markdown.contains("**Take dynamic+awq+gptq+dwq: ") && markdown.contains("| basic | 6 | 0.0939 ± "),
        "{markdown}"
    );
    // The word on the guide is the last one everywhere.
    for text in [opens, markdown] {
        assert!(text.find("mlx-lm's guide") > text.find("windows"), "{text}");
    }
}

#[test]
fn evaluations() {
    let mut alone = measures(&[0.05, 0.06, 0.07]);
    alone.against = None;
    let alone = evaluation(alone);
    snapshot("eval-alone", |width| report::table(&alone, width));
    let mut both = evaluation(measures(&[0.0939, 0.0876, 0.1002]));
    snapshot("eval", |width| report::table(&both, width));
    let source =
        |name: &str| SourceEvaluation { name: name.to_owned(), measures: measures(&[0.09, 0.08, 0.1]) };
    both.by_source = vec![source("first.txt"), source("second.jsonl")];
    snapshot("eval-several", |width| report::table(&both, width));
    assert!(report::markdown(&both).contains("\nThe perplexity 1.0580 ± "), "{}", report::markdown(&both));
}

#[test]
fn inspections_and_plans() {
    let layer = |path: &str, bytes| Layer {
        path: path.to_owned(),
        shape: vec![14_336, 4096],
        scheme: "4 bits, group size 64".to_owned(),
        packing: None,
        dtype: "BF16".to_owned(),
        weights: 58_720_256,
        bytes,
    };
    let paths = (0..32).map(|block| format!("language_model.model.layers.{block}.mlp.up_proj"));
    let mut layers: Vec<Layer> = paths.map(|path| layer(&path, 33_030_144)).collect();
    layers.push(layer("language_model.lm_head", 590_000));
    let total = |layers, weights, bytes| Total { layers, weights, bytes };
    let made = Inspection {
        model: "model".to_owned(),
        model_type: "llama".to_owned(),
        family: "llama",
        described: true,
        decoder_described: true,
        form: Form::Quantized,
        dimensions: Some(Dimensions { layers: 32, hidden_size: 4096, vocabulary: 128_256 }),
        towers: None,
        parameters: 8_030_261_248,
        bits_per_weight: 4.503,
        tensor_bytes: 4_517_000_000,
        file_bytes: 4_517_123_456,
        files: vec![("model.safetensors".to_owned(), 4_517_123_456)],
        dtypes: BTreeMap::from([("BF16".to_owned(), 502_000_000), ("U32".to_owned(), 4_015_000_000)]),
        schemes: BTreeMap::from([(
            "4 bits, group size 64".to_owned(),
            total(225, 8_030_000_000, 4_516_000_000),
        )]),
        other: total(65, 266_240, 532_480),
        layers,
    };
    snapshot("inspect", |width| report::inspection(&made, false, width));
    assert_eq!(report::inspection(&made, true, 120).matches("up_proj").count(), 32);
    // Nobody has to count digits.
    assert!(!report::inspection(&made, true, 200).contains("33030144"));
    let named = |name: &str, scheme: &str, bytes| LayerReport {
        name: name.to_owned(),
        shape: vec![14_336, 4096],
        scheme: scheme.to_owned(),
        bytes,
    };
    let plan = PlanReport {
        model_type: "llama".to_owned(),
        family: "llama",
        described: false,
        parameters: 8_030_261_248,
        bits_per_weight: 4.503,
        towers: None,
        drafter: None,
        input_bytes: 16_060_522_496,
        output_bytes: 4_517_123_456,
        files: vec![("a".to_owned(), 1), ("b".to_owned(), 2)],
        schemes: BTreeMap::new(),
        notes: Vec::new(),
        layers: vec![
            named("model.layers.0.post_attention_layernorm.weight", "BF16", 8192),
            named("model.layers.0.mlp.up_proj", "4 bits, group size 64", 33_030_144),
        ],
    };
    snapshot("plan", |width| report::plan(&plan, false, width));
    snapshot("plan-each", |width| report::plan(&plan, true, width));
}

fn forecast(seconds: f64, peak_memory: u64) -> Forecast {
    Forecast {
        bits_per_weight: 4.503,
        bytes: 4_517_123_456,
        peak_memory,
        seconds,
        operations: 1e15,
        low_memory: false,
        parts: Vec::new(),
        memory: QuantizeMemory::default(),
        sensitivities_memory: None,
        dwq_memory: None,
        card_memory: None,
    }
}

#[test]
fn forecasts() {
    let (quick, slow) = (forecast(12.4, 58_000_000), forecast(388_800.0, 70_600_000_000));
    let needs = [("basic", &quick), ("dynamic+awq+gptq+dwq", &slow)];
    snapshot("compare-plan", |width| report::foreseen(needs, width));
    assert!(report::foreseen(needs, 80).contains(" 4 d 12 h "), "{}", report::foreseen(needs, 80));
    let choice = |method: &str, kl: (f64, f64), forecast: Option<Forecast>, memory: Option<u64>| Choice {
        method: method.to_owned(),
        expected_kl: Some(Expected { low: kl.0, high: kl.1 }),
        recipe: if method == "basic" { "rtn" } else { method }.parse().unwrap(),
        bits: 4,
        target_bpw: None,
        windows: None,
        obstacle: forecast.is_none().then(|| "needs up to 81.2 GB of memory, 16.0 GB may be used".to_owned()),
        memory_at_most: forecast.as_ref().map(|needs| needs.peak_memory / 100 * 115),
        forecast,
        mlx_lm: memory.map(|memory| Peer { memory: Some(memory), source: "its guide".to_owned() }),
    };
    let basic = choice("basic", (0.094, 0.56), Some(quick.clone()), Some(16_000_000_000));
    let dynamic = choice("dynamic", (0.044, 0.12), Some(slow.clone()), Some(88_200_000_000));
    let row = |when: &str, choice: Option<&Choice>| Row {
        when: when.to_owned(),
        limit: None,
        choice: choice.cloned(),
        same_as: None,
        why: String::new(),
    };
    let mut cannot = choice("awq", (0.069, 0.19), Some(slow.clone()), None);
    cannot.mlx_lm = Some(Peer { memory: None, source: "its code".to_owned() });
    let made = Recommendation {
        rows: vec![row("now", Some(&basic)), row("within an hour", None), row("overnight", Some(&dynamic))],
        choices: vec![basic, cannot, dynamic, choice("dynamic+awq+gptq+dwq", (0.0004, 0.009), None, None)],
        pick: Some(2),
        why: String::new(),
    };
    snapshot("advice", |width| report::advice(&made, width));
    snapshot("methods", |width| report::methods(&made, width));
    let machine =
        Machine { threads: 2, products: 4.1e11, rounding: 8e9, read: 2.5e9, write: 9e8, card: None };
    let card = CardRates { products: 4.52e13, search: 2e12, rounding: 3e12, upload: 4e9, fetch: 5e9 };
    let with_card = machine.with(Some(card));
    snapshot("machine-card", |width| {
        report::machine(&with_card, 12_000_000_000, Some(24_000_000_000), width)
    });
    let card = CardMemory { part: "calibrating", peak: 7_900_000_000, ..CardMemory::default() };
    let on_card = Forecast { card_memory: Some(card), ..slow.clone() };
    let needs = [("basic", &quick), ("dynamic+awq+gptq+dwq", &on_card)];
    snapshot("compare-plan-card", |width| report::foreseen(needs, width));
    let choices = vec![choice("gptq", (0.055, 0.13), Some(on_card), Some(88_200_000_000))];
    let made = Recommendation { rows: Vec::new(), choices, pick: None, why: String::new() };
    snapshot("methods-card", |width| report::methods(&made, width));
    snapshot("machine", |width| report::machine(&machine, 12_000_000_000, Some(24_000_000_000), width));
}

#[test]
fn what_computes() {
    let adapter = |device: &str, name: &str, kind: &str, memory| Adapter {
        device: device.to_owned(),
        name: name.to_owned(),
        kind: kind.to_owned(),
        backend: "vulkan".to_owned(),
        driver: "NVIDIA 580.95.05".to_owned(),
        memory,
        largest_buffer: 1 << 40,
        largest_binding: 4 << 30,
    };
    let all = [
        adapter("gpu:0", "NVIDIA H100 80GB HBM3", "discrete", Some(85_500_000_000)),
        adapter("gpu:1", "llvmpipe (LLVM 19.1.7, 256 bits)", "software", None),
    ];
    let row = |adapter: &Adapter, products| EngineRow {
        device: adapter.device.clone(),
        name: adapter.name.clone(),
        kind: adapter.kind.clone(),
        driver: format!("{}, {}", adapter.backend, adapter.driver),
        memory: adapter.memory,
        largest: Some((adapter.largest_buffer, adapter.largest_binding)),
        products,
    };
    let cpu = EngineRow {
        device: "cpu".to_owned(),
        name: "x86-v4, 16 threads".to_owned(),
        kind: "processor".to_owned(),
        driver: String::new(),
        memory: Some(128_000_000_000),
        largest: None,
        products: Ok(2.1e12),
    };
    let engines = |auto: &str, no_card: Option<&str>| Engines {
        cpu: "cpu x86-v4".to_owned(),
        adapters: all.to_vec(),
        auto: auto.to_owned(),
        no_card: no_card.map(str::to_owned),
    };
    let why = "it has 8192 bytes of workgroup memory, 16384 are needed; hint: a newer driver, or cpu";
    let rows = [cpu.clone(), row(&all[0], Ok(4.52e13)), row(&all[1], Err(why.to_owned()))];
    snapshot("engines", |width| report::engines(&engines("gpu:0", None), &rows, width));
    let why = "no graphics adapter was found; hint: the Vulkan loader may be missing (Debian: libvulkan1)";
    let alone = Engines { adapters: Vec::new(), ..engines("cpu", Some(why)) };
    snapshot("engines-alone", |width| report::engines(&alone, std::slice::from_ref(&cpu), width));
}

#[test]
fn lists_of_facts() {
    let lines = [
        ("recipe", "dynamic+awq+gptq+dwq".to_owned()),
        ("calibration", "128 windows of 512 tokens".to_owned()),
        (
            "",
            "conversations-of-some-length.jsonl: 128 of 4096 windows, evenly spaced over all of it"
                .to_owned(),
        ),
        ("peak memory", "about 4.51 GB".to_owned()),
    ];
    snapshot("facts", |width| report::facts(&lines, width));
}
