//! Which adapter the suite uses, and what is the gpu engine's alone.
//!
//! `MLX_QUANT_TEST_ADAPTER` names one (`gpu:1`, `gpu:llvmpipe`) and makes it an error if it is not there. Without it
//! the first card is taken, or else a software adapter, since a test is no run of anybody's. Without any adapter these
//! tests are left out, and say so.

use std::io::Write as _;
use std::sync::OnceLock;

use mlx_format::{FloatType, Scheme};
use mlx_quant_engine::gpu::{AdapterChoice, AdapterKind, Gpu, Tiles, adapters};
use mlx_quant_engine::rounding::How;
use mlx_quant_engine::running::RunningDivergence;
use mlx_quant_engine::{
    Activation, AdamInputs, AdamStep, AttentionSettings, Candidates, Device, Factor, Gram, GramSum,
    GridSlopes, LAST, Labels, Likeliest, Pairing, Selection, Tensor, Unit, plain,
};

use super::learning::Weight;
use super::{Operation, bits, distance, gradients, on, run, tensor, values};

/// To stderr itself: what is printed is shown of failed tests alone.
pub(crate) fn say(what: &str) {
    let _ = writeln!(std::io::stderr(), "{what}");
}

/// What a test of this module has, or else it is left out by name.
fn there<T>(what: Option<T>) -> Option<T> {
    if what.is_none() {
        say(&format!(
            "left out, for want of an adapter: {}",
            std::thread::current().name().unwrap_or("a test")
        ));
    }
    what
}

/// The adapter of the tests.
fn choice() -> Option<AdapterChoice> {
    if let Ok(name) = std::env::var("MLX_QUANT_TEST_ADAPTER") {
        return Some(name.parse().unwrap());
    }
    let all = adapters();
    let card = all.iter().find(|adapter| adapter.kind != AdapterKind::Software);
    card.or(all.first()).map(|adapter| AdapterChoice::Index(adapter.index))
}

/// The gpu engine of this machine, one for all tests.
pub(crate) fn device() -> Option<Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let open = || {
        let Some(choice) = choice() else {
            say("the gpu engine is not tested: this machine has no adapter");
            return None;
        };
        let gpu = Gpu::open(&choice).unwrap();
        say(&format!("the gpu engine is tested on {:?}", gpu.adapter()));
        Some(Device::new(gpu))
    };
    DEVICE.get_or_init(open).clone()
}

/// One whose kernels see so many bytes of a buffer at once.
fn narrow(bytes: u64) -> Option<Device> {
    there(choice()).map(|choice| Device::new(Gpu::with_binding(&choice, bytes).unwrap()))
}

#[test]
fn a_software_adapter_has_to_be_named() {
    let cards = adapters().iter().filter(|adapter| adapter.kind != AdapterKind::Software).count();
    match Gpu::open(&AdapterChoice::Best) {
        Ok(gpu) => assert!(cards > 0 && gpu.adapter().kind != AdapterKind::Software),
        Err(error) => {
            assert_eq!(cards, 0);
            assert!(error.to_string().contains("hint: "), "{error}");
        }
    }
    for wrong in [AdapterChoice::Index(99), AdapterChoice::Name("no such card".to_owned())] {
        let error = Gpu::open(&wrong).unwrap_err().to_string();
        assert!(error.contains("hint: "), "{error}");
    }
}

/// What does not fit a binding goes in parts, to the same results.
#[test]
fn operations_go_in_parts_that_fit_a_binding() {
    let Some(device) = narrow(4096) else { return };
    let (x, y) = (tensor(&[40, 90], 1), tensor(&[40, 90], 2));
    let (own_x, own_y) = (on(&device, &x), on(&device, &y));
    let same = |own: Tensor, reference: Tensor| {
        assert!(distance(&own, &reference) <= 5e-6, "{}", distance(&own, &reference));
    };
    same((&own_x + &own_y).unwrap(), (&x + &y).unwrap());
    same(own_x.t().unwrap(), x.t().unwrap());
    same(
        own_x.broadcast_mul(&own_y.narrow(0, 3, 1).unwrap()).unwrap(),
        x.broadcast_mul(&y.narrow(0, 3, 1).unwrap()).unwrap(),
    );
    for axis in 0..2 {
        same(own_x.sum(axis).unwrap(), x.sum(axis).unwrap());
        same(own_x.max_keepdim(axis).unwrap(), x.max_keepdim(axis).unwrap());
    }
    same(own_x.sum_all().unwrap(), x.sum_all().unwrap());
    let ids: Vec<u32> = (0..60).map(|at| at * 7 % 40).collect();
    same(own_x.rows(&ids).unwrap(), x.rows(&ids).unwrap());
    same(Tensor::cat(&[&own_x, &own_y], LAST).unwrap(), Tensor::cat(&[&x, &y], LAST).unwrap());
    let variable = own_x.variable();
    let gradient = variable.rows(&ids).unwrap().gradients(&own_x.rows(&ids).unwrap()).unwrap();
    let reference = x.variable();
    let expected = reference.rows(&ids).unwrap().gradients(&x.rows(&ids).unwrap()).unwrap();
    same(gradient.get(&variable).unwrap().clone(), expected.get(&reference).unwrap().clone());
    same(own_x.matmul(&own_y.t().unwrap()).unwrap(), x.matmul(&y.t().unwrap()).unwrap());
    let bias = tensor(&[40], 3);
    let weight = on(&device, &y).variable();
    let input = own_x.variable();
    let linear = device.linear(&input, &weight, Some(&on(&device, &bias))).unwrap();
    let (own_weight, own_input) = (y.variable(), x.variable());
    let reference = plain().linear(&own_input, &own_weight, Some(&bias)).unwrap();
    same(linear.clone(), reference.clone());
    let seed = tensor(&[40, 40], 5);
    let [own, expected] =
        [linear.gradients(&on(&device, &seed)), reference.gradients(&seed)].map(Result::unwrap);
    same(own.get(&weight).unwrap().clone(), expected.get(&own_weight).unwrap().clone());
    same(own.get(&input).unwrap().clone(), expected.get(&own_input).unwrap().clone());
}

/// So do grids that are trained: element by element the same bits, sums as good ones.
#[test]
fn training_goes_in_parts_that_fit_a_binding() {
    let (Some(device), Some(whole)) = (narrow(4096), device()) else { return };
    let all = [1, 2, 3, 4, 5].map(|seed| (tensor(&[70, 40], seed) * 0.01).unwrap());
    let [parts, expected] = [&device, &whole].map(|device| {
        let [values, first, second, slopes, scales] = all.each_ref().map(|x| on(device, x));
        let second = second.sqr().unwrap();
        let unit = Unit { factor: 3.0, divisor: 15.0 };
        let step = AdamStep {
            betas: [0.9, 0.999],
            corrections: [0.1, 0.001],
            clip: 0.5,
            rate: 0.01,
            unit: Some(unit),
        };
        let inputs =
            AdamInputs { values: &values, moments: [&first, &second], slopes: &slopes, scales: &scales };
        let [values, first, second] = device.adam(&step, inputs).unwrap();
        let [stored, biases] = device.stored_grid(&scales, &values, 7.5, FloatType::Bf16).unwrap();
        let grid = GridSlopes { scales: &scales, slopes: [&slopes, &first], units: [unit, unit] };
        let squares = device.grid_squares(&[grid, grid]).unwrap();
        assert_eq!(squares[0], squares[1]);
        ([values, first, second, stored, biases].map(|x| bits(&x)), squares[0])
    });
    assert_eq!(parts.0, expected.0);
    assert!((parts.1 - expected.1).abs() < 1e-6 * expected.1, "{} {}", parts.1, expected.1);
}

/// So does rounding that is learned, to the bit.
#[test]
fn learned_rounding_goes_in_parts_that_fit_a_binding() {
    let (Some(narrow), Some(whole)) = (narrow(16_384), device()) else { return };
    let weight = Weight::new(3, 32, FloatType::F16, (300, 96));
    let of = |device: &Device| {
        let (start, mut state) = weight.on(device);
        let gradient = on(device, &tensor(&[300, 96], 8));
        device.learning_step(&start, &mut state, &gradient, 0.05).unwrap();
        let decoded = device.learned_weight(&start, &state).unwrap();
        let codes = device.learned_codes(start.scheme, &state.positions).unwrap();
        let left = device.without_largest(&gradient, 200).unwrap();
        let [low, high] = &state.factors;
        let codes = device.fetch_codes(&codes, 300 * 96).unwrap();
        ([&state.positions, low, high, &decoded, &left].map(bits), codes)
    };
    let [own, other] = [of(&narrow), of(&whole)];
    assert!(own == other);
}

/// Positions, gradients and what they decode to four each, codes in the beginning and best codes one; grids beside them.
/// Steps are in place. (The plan counts on it: `quant/src/forecast/card_memory/on_card.rs`.)
#[test]
fn what_learns_takes_fourteen_bytes_a_weight() {
    let Some(choice) = there(choice()) else { return };
    let device = Device::new(Gpu::open(&choice).unwrap());
    let weight = Weight::new(2, 64, FloatType::Bf16, (512, 1024));
    let (start, mut state) = weight.on(&device);
    let gradient = on(&device, &tensor(&[512, 1024], 1));
    let _best = device.learned_codes(start.scheme, &state.positions).unwrap();
    device.reset_peak();
    let peak = || device.memory().unwrap().peak as f64 / (512.0 * 1024.0);
    device.learning_step(&start, &mut state, &gradient, 0.01).unwrap();
    assert!((10.0..10.6).contains(&peak()), "{}", peak());
    let _decoded = device.learned_weight(&start, &state).unwrap();
    assert!((14.0..14.6).contains(&peak()), "{}", peak());
}

/// Products that keep a card busy get the same bits from every form of their tiles: of each operand along and across,
/// with edges that fill no tile, in lines that are no whole vec4s, and of triangles.
#[test]
fn tiles_decide_no_bit() {
    let Some(choice) = there(choice()) else { return };
    let of = |tiles: Tiles, n: usize, k: usize| -> Vec<Vec<u32>> {
        let device = Device::new(Gpu::with_tiles(&choice, tiles).unwrap());
        let (x, weight) = (on(&device, &tensor(&[1536, k], 1)), on(&device, &tensor(&[n, k], 2)));
        let y = device.linear(&x, &weight, Some(&on(&device, &tensor(&[n], 3)))).unwrap();
        let across = x.matmul(&weight.t().unwrap()).unwrap();
        let mut gram = GramSum::new(n, &device).unwrap();
        gram.add(&y.narrow(0, 0, k).unwrap()).unwrap();
        [&y, &across, &gram.finish().unwrap().values].map(bits).into()
    };
    for (n, k) in [(3072, 48), (3000, 44), (3001, 21)] {
        let plain = of(Tiles::Plain, n, k);
        assert!(of(Tiles::Turns, n, k) == plain, "{n} {k}");
    }
}

#[test]
fn coarse_operations_go_in_parts_that_fit_a_binding() {
    let Some(device) = narrow(16_384) else { return };
    let settings = AttentionSettings { scale: 0.3, window: Some(30), softcap: Some(2.0), sinks: None };
    let q = tensor(&[3, 70, 6, 16], 1);
    let [k, v] = [2, 3].map(|seed| tensor(&[3, 70, 2, 16], seed));
    let angles = tensor(&[70, 8], 4);
    let attention = [q.clone(), k, v, tensor(&[6], 9)];
    let wide = [tensor(&[40, 200], 1), tensor(&[200], 2), tensor(&[200], 3)];
    let pair = [tensor(&[40, 200], 5), tensor(&[40, 200], 6)];
    let state = |shape: &[usize], seed| (tensor(shape, seed) * 0.2).unwrap();
    let linear = [
        state(&[3, 20, 2, 24], 1),
        state(&[3, 20, 2, 24], 2),
        tensor(&[3, 20, 4, 40], 3),
        tensor(&[3, 20, 4], 4).abs().unwrap().neg().unwrap(),
    ];
    let operations: [(&str, &[Tensor], Operation<'_>); 8] = [
        ("attention", &attention, &|device, x| {
            let settings = AttentionSettings { sinks: Some(x[3].clone()), ..settings.clone() };
            device.attention(&x[0], &x[1], &x[2], &settings)
        }),
        ("rms_norm", &wide[..2], &|device, x| device.rms_norm(&x[0], Some(&x[1]), 1e-5)),
        ("layer_norm", &wide, &|device, x| device.layer_norm(&x[0], Some(&x[1]), Some(&x[2]), 1e-5)),
        ("softmax", &wide[..1], &|device, x| device.softmax(&x[0])),
        ("glu", &pair, &|device, x| device.glu(&x[0], &x[1], Activation::GeluTanh)),
        ("rotary", &attention[..1], &|device, x| {
            device.rotary(&x[0], &on(device, &angles), &on(device, &angles), Pairing::Interleaved)
        }),
        ("linear", &pair, &|device, x| device.linear(&x[0], &x[1], None)),
        ("linear_attention", &linear, &|device, x| device.linear_attention(&x[0], &x[1], &x[2], &x[3])),
    ];
    for (name, inputs, operation) in operations {
        let [own, reference] = [&device, &plain()].map(|device| run(device, operation, inputs));
        assert!(distance(&own, &reference) <= 5e-6, "{name}: {}", distance(&own, &reference));
        let [own, reference] = [&device, &plain()].map(|device| gradients(device, operation, inputs));
        for (at, (own, reference)) in own.iter().zip(&reference).enumerate() {
            let apart = distance(own, reference);
            assert!(apart <= 2e-5, "{name}: gradient of input {at}: {apart}");
        }
    }
}

/// Losses, routing and the gated delta rule in parts give the bits of the whole.
#[test]
fn parts_have_the_bits_of_the_whole() {
    let (Some(narrow), Some(whole)) = (narrow(16_384), device()) else { return };
    let (tokens, width) = (37, 300);
    let [own, theirs] = [1, 2].map(|seed| tensor(&[tokens, width], seed));
    let lse = vec![7.5; tokens];
    let ids: Vec<u32> = (10..10 + width as u32).step_by(17).collect();
    let logs = vec![-3.0f32; ids.len()];
    let likeliest = vec![Likeliest { ids: &ids, log_probabilities: &logs }; tokens];
    let targets: Vec<u32> = (0..tokens as u32).map(|token| 8 * token).collect();
    let of = |device: &Device| {
        let [own, theirs] = [&own, &theirs].map(|x| on(device, x));
        let mut both = vec![RunningDivergence::default(); tokens];
        device.compare(&theirs, &own, 10, &targets, &mut both).unwrap();
        let mut found = vec![Candidates::default(); tokens];
        device.keep_likeliest(&own, 10, 20, &mut found).unwrap();
        let found: Vec<Vec<(f32, u32)>> = found.into_iter().map(|own| own.found).collect();
        let (mut losses, mut known) = ([0.0; 2], vec![0.0; tokens]);
        let mut labels = Labels::new((0..tokens).map(|token| token as f64 / 40.0).collect());
        let (first, squares) = device.label_slopes(&own, &lse, Some(9.0), false, &mut labels).unwrap();
        // Labels that are not drawn yet are drawn from what is left.
        let (last, _) = device.label_slopes(&theirs, &lse, None, true, &mut labels).unwrap();
        let factors = (0.5, 2.0);
        let second = device.divergence_slopes(&theirs, &own, (&lse, &lse), factors, &mut losses[0]).unwrap();
        let rest = vec![0.5; tokens];
        let third =
            device.likeliest_slopes(&own, 10, &likeliest, (&lse, &rest), factors, &mut losses[1]).unwrap();
        device.likeliest_probability(&own, 10, &likeliest, (&lse, 0.5), &mut known).unwrap();
        let routed = device.route(&own, &Selection { top_k: 5, groups: None }).unwrap();
        ((both, found, losses, known, routed, [&first, &last, &second, &third].map(bits)), squares)
    };
    let [(own, own_squares), (other, squares)] = [of(&narrow), of(&whole)];
    assert_eq!(own, other);
    // Squares are sums over rows, of which a part makes others.
    let apart = own_squares.iter().zip(&squares).map(|(own, other)| (own - other).abs());
    assert!(apart.fold(0.0, f64::max) < 1e-6);
}

/// The rule's gradient takes as many columns at a time as there is room for.
#[test]
fn gradients_of_the_gated_delta_rule_go_in_parts() {
    let (Some(narrow), Some(whole)) = (narrow(1 << 20), device()) else { return };
    let [q, k] = [1, 2].map(|seed| (tensor(&[2, 50, 2, 20], seed) * 0.2).unwrap());
    let rule: Operation<'_> = &|device, x| device.gated_delta(&x[0], &x[1], &x[2], &x[3], &x[4]);
    // A decay of a head, and one of each row of its state.
    for decays in [vec![2, 50, 2], vec![2, 50, 2, 20]] {
        let beta = (tensor(&[2, 50, 2], 5) * 0.1).unwrap();
        let inputs = [q.clone(), k.clone(), tensor(&[2, 50, 2, 130], 3), tensor(&decays, 4), beta];
        let [own, other] = [&narrow, &whole].map(|device| gradients(device, rule, &inputs));
        assert_eq!(own.iter().map(bits).collect::<Vec<_>>(), other.iter().map(bits).collect::<Vec<_>>());
    }
}

/// What a kernel has no registers for runs on the processor, and is said.
#[test]
fn what_is_left_to_the_processor_is_said() {
    let Some(choice) = there(choice()) else { return };
    let device = Device::new(Gpu::open(&choice).unwrap());
    for (keys, left) in [(512, 0), (513, 1)] {
        let [q, k] = [1, 2].map(|seed| (tensor(&[1, 3, 1, keys], seed) * 0.05).unwrap());
        let inputs = [q, k, tensor(&[1, 3, 1, 5], 3), tensor(&[1, 3, 1], 4), tensor(&[1, 3, 1], 5)];
        let rule: Operation<'_> = &|device, x| device.gated_delta(&x[0], &x[1], &x[2], &x[3], &x[4]);
        let [own, reference] = [&device, &plain()].map(|device| gradients(device, rule, &inputs));
        let apart = own.iter().zip(&reference).map(|(own, reference)| distance(own, reference));
        assert!(apart.fold(0.0, f32::max) <= 2e-5);
        let said: Vec<&str> = device.left().into_iter().map(|(operation, _)| operation).collect();
        assert_eq!(said, vec!["the gated delta rule"; left], "{keys}");
    }
    let device = Device::new(Gpu::open(&choice).unwrap());
    for (values, left) in [(512, 0), (513, 1)] {
        let [q, k] = [1, 2].map(|seed| tensor(&[1, 3, 1, 5], seed));
        let inputs =
            [q, k, tensor(&[1, 3, 2, values], 3), tensor(&[1, 3, 2], 4).abs().unwrap().neg().unwrap()];
        let rule: Operation<'_> = &|device, x| device.linear_attention(&x[0], &x[1], &x[2], &x[3]);
        let [own, reference] = [&device, &plain()].map(|device| gradients(device, rule, &inputs));
        let apart = own.iter().zip(&reference).map(|(own, reference)| distance(own, reference));
        assert!(apart.fold(0.0, f32::max) <= 2e-5);
        let said: Vec<&str> = device.left().into_iter().map(|(operation, _)| operation).collect();
        assert_eq!(said, vec!["linear attention"; left], "{values}");
    }
    assert!(plain().left().is_empty());
}

#[test]
fn matrices_go_in_parts_that_fit_a_binding() {
    let (Some(device), Some(whole)) = (narrow(65_536), device()) else { return };
    let of = |device: &Device, size: usize| {
        let mut sum = GramSum::new(size, device).unwrap();
        sum.add(&on(device, &tensor(&[1, 300, size], 5))).unwrap();
        sum.finish().unwrap()
    };
    let order = |size: usize| (0..size).rev().collect::<Vec<usize>>();
    // Rows of a matrix that are summed alone too.
    let mut parts = Gram::empty(200, &device).unwrap();
    for rows in [0..90, 90..200] {
        let mut sum = GramSum::of_rows(200, rows, &device).unwrap();
        sum.add(&on(&device, &tensor(&[1, 300, 200], 5))).unwrap();
        sum.place(&mut parts).unwrap();
    }
    assert!(distance(&parts.values, &of(&plain(), 200).values) < 1e-5);
    let [own, reference] = [&device, &plain()].map(|device| of(device, 160));
    assert!(distance(&own.values, &reference.values) < 1e-5);
    let [own, reference] =
        [own, reference].map(|gram| Factor::new(&gram, order(160), 0.01).unwrap().unwrap());
    assert!(distance(&own.upper, &reference.upper) < 1e-3);
    assert!(distance(&own.hessian, &reference.hessian) < 1e-5);
    // Parts of a weight's rows get what they get in the whole.
    let rounded = [&device, &whole].map(|device| {
        let factor = Factor::new(&of(device, 128), order(128), 0.01).unwrap().unwrap();
        let how = How::Compensated { factor: &factor, block_size: 64, sweeps: 1 };
        let scheme = Scheme::affine(4, 32).unwrap();
        device
            .round(&on(device, &tensor(&[200, 128], 6)), scheme, FloatType::Bf16, how)
            .unwrap()
            .0
            .fetch()
            .unwrap()
    });
    let same = rounded[0].codes.iter().zip(&rounded[1].codes).filter(|(a, b)| a == b).count();
    assert!(same * 100 > 99 * 200 * 128, "{same}");
    assert_eq!(rounded[0].scales.len(), rounded[1].scales.len());
}

/// More than llvmpipe, or this card, sees at once.
#[test]
fn a_tensor_beyond_a_binding() {
    let Some(device) = there(device()) else { return };
    let count = 40 << 20;
    let x = Tensor::from_vec((0..count).map(|at| (at % 1000) as f32).collect(), (1 << 10, 40 << 10), &device)
        .unwrap();
    let y = (&x * 2.0).unwrap().t().unwrap();
    let last = y.narrow(0, (40 << 10) - 1, 1).unwrap();
    let expected: Vec<f32> = (1..=1 << 10).map(|row| ((row * (40 << 10) - 1) % 1000) as f32 * 2.0).collect();
    assert_eq!(values(&last), expected);
}

#[test]
fn memory_is_counted_and_used_again() {
    let Some(choice) = there(choice()) else { return };
    let device = Device::new(Gpu::open(&choice).unwrap());
    let x = Tensor::full(1.0, (1000, 1000), &device).unwrap();
    let one = device.memory().unwrap();
    assert!(one.in_use >= 4_000_000 && one.in_use < 5_000_000 && one.peak >= one.in_use, "{one:?}");
    for _ in 0..50 {
        drop((&x + &x).unwrap());
    }
    let after = device.memory().unwrap();
    assert_eq!(after.in_use, one.in_use);
    assert!(after.peak <= 2 * one.peak && after.kept <= one.peak, "{after:?}");
    drop(x);
    assert_eq!(device.memory().unwrap().in_use, 0);
}

/// A Hessian and its factor take two matrices and little beside them, and of the Gram matrix nothing stays.
#[test]
fn a_factor_takes_little_beside_its_matrices() {
    let Some(choice) = there(choice()) else { return };
    let (device, size) = (Device::new(Gpu::open(&choice).unwrap()), 1024);
    let mut sum = GramSum::new(size, &device).unwrap();
    sum.add(&on(&device, &tensor(&[300, size], 1))).unwrap();
    let gram = sum.finish().unwrap();
    let order = || (0..size).rev().collect::<Vec<usize>>();
    let held = Factor::new(&gram, order(), 0.01).unwrap().unwrap();
    let bits_of = |factor: &Factor| [bits(&factor.upper), bits(&factor.hessian)];
    let expected = bits_of(&held);
    drop(held);
    device.reset_peak();
    let factor = Factor::of(gram, order(), 0.01).unwrap().unwrap();
    let (square, memory) = (4 * (size * size) as u64, device.memory().unwrap());
    assert_eq!(memory.in_use, 2 * square);
    assert!(memory.peak < 5 * square / 2, "{memory:?}");
    assert!(bits_of(&factor) == expected);
}

/// What an adapter cannot hold is an error that says so, and not the end.
#[test]
fn too_large_is_an_error() {
    let Some(device) = there(device()) else { return };
    let x = Tensor::full(1.0, (1 << 16, 1), &device).unwrap();
    let error = x.broadcast_as((1 << 16, 1 << 16)).unwrap_err().to_string();
    assert!(error.contains("hint: "), "{error}");
    assert_eq!(values(&x.sum_all().unwrap()), [65_536.0]);
}

#[test]
fn tensors_of_other_engines_are_refused() {
    let (Some(device), Some(other)) = (device(), narrow(4096)) else { return };
    let (x, y, host) = (on(&device, &tensor(&[3], 1)), on(&other, &tensor(&[3], 1)), tensor(&[3], 1));
    assert!((&x + &y).is_err() && (&x + &host).is_err() && (&host + &x).is_err());
    assert_eq!(bits(&x), bits(&y));
}

/// Windows on several threads at a time get what they get alone.
#[test]
fn threads_share_a_card() {
    let Some(device) = there(device()) else { return };
    let weight = on(&device, &tensor(&[64, 96], 1));
    let of = |seed: u64| {
        let x = on(&device, &tensor(&[17, 96], seed));
        let y = device.linear(&x, &weight, None).unwrap();
        bits(&device.softmax(&device.rms_norm(&y, None, 1e-5).unwrap()).unwrap())
    };
    let alone: Vec<_> = (0..8).map(of).collect();
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|seed| scope.spawn(move || of(seed))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(alone, together);
}
