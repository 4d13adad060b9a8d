#![allow(clippy::unwrap_used, reason = "a test panics to fail")]

use super::*;

/// A clock that is set by hand.
struct Clock(Instant);

impl Clock {
    fn at(&self, seconds: u64) -> Instant {
        self.0 + Duration::from_secs(seconds)
    }
}

/// A name and what is expected of it, seconds.
type Part = (&'static str, Option<f64>);

/// Steps with what each of their parts is expected to take.
fn steps(all: &[(&str, &[Part])]) -> Vec<Step> {
    let step = |(name, parts): &(&str, &[Part])| {
        let mut step = Step::new(*name, parts.iter().map(|part| part.0));
        for (own, part) in step.parts.iter_mut().zip(*parts) {
            own.seconds = part.1;
        }
        step
    };
    all.iter().map(step).collect()
}

/// gptq of 32 blocks for an hour, then an evaluation of ten minutes.
fn job() -> (Job, Clock) {
    let clock = Clock(Instant::now());
    let all = steps(&[
        ("gptq", &[("quantize", Some(3600.0))]),
        ("evaluation", &[("reference", Some(240.0)), ("model", Some(240.0)), ("head", Some(120.0))]),
    ]);
    (Job::new(&all, clock.at(0)), clock)
}

fn line(job: &Job, now: Instant) -> String {
    fitted(&job.fields(now), 200)
}

#[test]
fn the_first_estimate_is_the_forecast() {
    let (mut job, clock) = job();
    assert_eq!(job.plan().unwrap(), "2 steps: gptq, evaluation; about 1 h 10 min in all");
    job.begin("quantize", Some(Unit::Blocks), (33, 1000), clock.at(0));
    let now = clock.at(0);
    assert_eq!(line(&job, now), "step 1 of 2, gptq, block 1 of 32, 1 h 10 min left of 1 h 10 min");
    // Nobody knows anything yet: nothing is said, and never that nothing is left.
    let mut blind = Job::new(&[Step::new("gptq", ["quantize"])], clock.at(0));
    blind.begin("quantize", Some(Unit::Blocks), (33, 1000), clock.at(0));
    assert_eq!(line(&blind, clock.at(5)), "gptq, block 1 of 32");
}

#[test]
fn what_takes_longer_is_expected_to_take_longer() {
    let (mut job, clock) = job();
    job.begin("quantize", Some(Unit::Blocks), (33, 1000), clock.at(0));
    let left = |job: &Job, at| job.times(clock.at(at)).unwrap().left;
    // The first block does not come to an end.
    assert!(left(&job, 2000) > left(&job, 0), "{}", left(&job, 2000));
    let mut previous = f64::INFINITY;
    for block in 1..=33 {
        job.progress(block, clock.at(200 * block));
        let now = left(&job, 200 * block);
        assert!(now < previous || block < 8, "block {block}: {now}");
        previous = now;
    }
    // Twice as long as expected: so is what comes.
    assert!((1000.0..1200.0).contains(&previous), "{previous}");
    job.begin("reference", Some(Unit::Parts), (10, 0), clock.at(6600));
    assert!((1000.0..1200.0).contains(&left(&job, 6600)), "{}", left(&job, 6600));
    let times = job.times(clock.at(6600)).unwrap();
    assert!((times.of.unwrap() - 6600.0 - times.left).abs() < 700.0, "{times:?}");
    assert_eq!(job.step().unwrap(), "step 2 of 2");
}

#[test]
fn a_job_that_goes_on_says_where_and_counts_what_it_does_itself() {
    let (mut job, clock) = job();
    job.begin("quantize", Some(Unit::Blocks), (33, 3300), clock.at(0));
    assert_eq!(job.goes_on(), None);
    job.resumed(11, clock.at(10));
    assert_eq!(job.goes_on().unwrap(), "gptq: goes on at block 12 of 32");
    assert_eq!(job.rate(clock.at(20)), None);
    job.progress(12, clock.at(20));
    assert_eq!(job.rate(clock.at(20)).unwrap(), "10 tokens/s");
    let times = job.times(clock.at(20)).unwrap();
    assert!(times.of.unwrap() > times.left + 600.0, "what was done before is part of all: {times:?}");
    // All of it, or nothing, is no word worth.
    job.resumed(33, clock.at(30));
    assert_eq!(job.goes_on(), None);
}

#[test]
fn what_was_not_needed_is_passed_over() {
    let clock = Clock(Instant::now());
    let all = steps(&[
        ("dynamic", &[("sensitivities", Some(100.0)), ("candidates", Some(50.0))]),
        ("awq+gptq", &[("quantize", Some(10.0))]),
        ("evaluation", &[("reference", Some(1.0)), ("model", Some(1.0))]),
    ]);
    let mut job = Job::new(&all, clock.at(0));
    job.begin("quantize", Some(Unit::Blocks), (3, 0), clock.at(0));
    assert_eq!(line(&job, clock.at(0)), "step 2 of 3, awq+gptq, block 1 of 2, 12 s left of 3 min");
    // A phase that nobody announced does not move it.
    job.begin("pilot", Some(Unit::Parts), (4, 0), clock.at(1));
    assert_eq!(job.name().unwrap(), "pilot");
    job.begin("model", Some(Unit::Parts), (4, 0), clock.at(2));
    assert_eq!(fitted(&job.fields(clock.at(2))[..3], 200), "step 3 of 3, evaluation: model, 0 %");
    assert!(job.part_done(clock.at(2)) > 0.9);
}

#[test]
fn steps_of_a_comparison_have_the_same_phases() {
    let clock = Clock(Instant::now());
    let all = steps(&[
        ("basic", &[("write", Some(1.0)), ("model", Some(1.0))]),
        ("gptq", &[("quantize", Some(5.0)), ("model", Some(1.0))]),
    ]);
    let mut job = Job::new(&all, clock.at(0));
    job.enter(0, clock.at(0));
    // Of the second step: not before that was entered.
    job.begin("quantize", Some(Unit::Blocks), (3, 0), clock.at(0));
    assert_eq!(job.step().unwrap(), "step 1 of 2");
    job.enter(1, clock.at(1));
    job.begin("quantize", Some(Unit::Blocks), (3, 0), clock.at(1));
    assert_eq!(fitted(&job.fields(clock.at(1))[..3], 99), "step 2 of 2, gptq: quantize, block 1 of 2");
}

#[test]
fn tries_are_counted_as_at_most() {
    let clock = Clock(Instant::now());
    let mut all = steps(&[("try 1", &[("quantize", Some(10.0))]), ("try 2", &[("quantize", Some(10.0))])]);
    all[1].optional = true;
    let mut job = Job::new(&all, clock.at(0));
    assert_eq!(job.plan().unwrap(), "1 steps: try 1, and at most 1 more; about 10 s in all");
    job.begin("quantize", Some(Unit::Blocks), (3, 0), clock.at(0));
    assert_eq!(line(&job, clock.at(0)), "step 1 of at most 2, try 1, block 1 of 2, 10 s left of 10 s");
    job.progress(3, clock.at(10));
    job.begin("quantize", Some(Unit::Blocks), (3, 0), clock.at(10));
    assert_eq!(line(&job, clock.at(10)), "step 2 of at most 2, try 2, block 1 of 2, 10 s left of 20 s");
}

#[test]
fn bytes_have_a_rate_and_no_name_of_their_own() {
    let clock = Clock(Instant::now());
    let mut job = Job::new(&[], clock.at(0));
    job.begin("write", None, (2_000_000_000, 0), clock.at(0));
    job.progress(500_000_000, clock.at(2));
    assert_eq!(line(&job, clock.at(2)), "500 MB of 2.00 GB, 6 s left, 250 MB/s");
}

#[test]
fn times_are_words() {
    for (seconds, text) in
        [(0.0, "1 s"), (45.2, "45 s"), (100.0, "2 min"), (7800.0, "2 h 10 min"), (388_800.0, "4 d 12 h")]
    {
        assert_eq!(duration(seconds), text);
    }
}

#[test]
fn narrow_screens_get_whole_fields() {
    let fields = ["step 1 of 2", "gptq", "block 1 of 32"].map(str::to_owned);
    assert_eq!(fitted(&fields, 80), "step 1 of 2, gptq, block 1 of 32");
    assert_eq!(fitted(&fields, 20), "step 1 of 2, gptq");
    assert_eq!(fitted(&fields, 3), "step 1 of 2");
}

#[test]
fn lines_come_with_blocks_or_minutes_whichever_is_rarer() {
    let clock = Clock(Instant::now());
    let mut lines = Lines::new(Duration::from_secs(60), clock.at(0));
    let due: Vec<u64> = (1..=10).map(|block| block * 25).filter(|at| lines.due(clock.at(*at))).collect();
    assert_eq!(due, [75, 150, 225]);
    // Blocks of five minutes.
    let due: Vec<u64> =
        (1..=3).map(|block| 225 + block * 300).filter(|at| lines.due(clock.at(*at))).collect();
    assert_eq!(due, [525, 825, 1125]);
}
