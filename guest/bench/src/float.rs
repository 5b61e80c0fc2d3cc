//! Floating point: scalar SSE2, AVX2 and x87.

use std::arch::asm;
use std::arch::x86_64::{
    __m256d, _mm256_fmadd_pd, _mm256_loadu_pd, _mm256_set1_pd, _mm256_setzero_pd, _mm256_storeu_pd,
};
use std::array::from_fn;
use std::hint::black_box;

use crate::{Outcome, Stop, Task, expect};

/// Terms of the series.
const TERMS: u64 = 100_000;
/// Rows and columns.
const SIZE: usize = 128;
/// Numbers in a vector register.
const LANES: usize = 4;

type Matrix = Vec<f64>;

/// Position, velocity, mass.
#[derive(Clone, Copy)]
struct Body {
    x: [f64; 3],
    v: [f64; 3],
    mass: f64,
}

const YEAR: f64 = 365.24;
const SOLAR_MASS: f64 = 4.0 * std::f64::consts::PI * std::f64::consts::PI;

/// Sun, Jupiter, Saturn, Uranus, Neptune; the data of the Computer Language Benchmarks Game.
fn solar_system() -> [Body; 5] {
    let body = |x, v: [f64; 3], mass| Body { x, v: v.map(|v| v * YEAR), mass: mass * SOLAR_MASS };
    let mut bodies = [
        body([0.0; 3], [0.0; 3], 1.0),
        body(
            [4.841_431_442_464_72, -1.160_320_044_027_428_4, -0.103_622_044_471_123_11],
            [0.001_660_076_642_744_037, 0.007_699_011_184_197_404, -0.000_069_046_001_697_206_3],
            0.000_954_791_938_424_326_6,
        ),
        body(
            [8.343_366_718_244_58, 4.124_798_564_124_305, -0.403_523_417_114_321],
            [-0.002_767_425_107_268_624, 0.004_998_528_012_349_172, 0.000_023_041_729_757_376_393],
            0.000_285_885_980_666_130_8,
        ),
        body(
            [12.894_369_562_139_131, -15.111_151_401_698_631, -0.223_307_578_892_655_73],
            [0.002_964_601_375_647_616, 0.002_378_471_739_594_809_5, -0.000_029_658_956_854_023_756],
            0.000_043_662_440_433_515_63,
        ),
        body(
            [15.379_697_114_850_917, -25.919_314_609_987_964, 0.179_258_772_950_371_18],
            [0.002_680_677_724_903_893_2, 0.001_628_241_700_382_423, -0.000_095_159_225_451_971_59],
            0.000_051_513_890_204_661_145,
        ),
    ];
    let momentum: [f64; 3] = from_fn(|axis| bodies.iter().map(|b| b.v[axis] * b.mass).sum());
    bodies[0].v = momentum.map(|p| -p / SOLAR_MASS);
    bodies
}

fn energy(bodies: &[Body; 5]) -> f64 {
    let kinetic: f64 = bodies.iter().map(|b| 0.5 * b.mass * b.v.iter().map(|v| v * v).sum::<f64>()).sum();
    let mut potential = 0.0;
    for (i, a) in bodies.iter().enumerate() {
        for b in &bodies[i + 1..] {
            let square: f64 = (0..3).map(|axis| (a.x[axis] - b.x[axis]).powi(2)).sum();
            potential -= a.mass * b.mass / square.sqrt();
        }
    }
    kinetic + potential
}

fn advance(bodies: &mut [Body; 5], dt: f64) {
    for i in 0..bodies.len() {
        for j in i + 1..bodies.len() {
            let (a, b) = (bodies[i], bodies[j]);
            let d: [f64; 3] = from_fn(|axis| a.x[axis] - b.x[axis]);
            let square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
            let magnitude = dt / (square * square.sqrt());
            for (axis, distance) in d.into_iter().enumerate() {
                bodies[i].v[axis] -= distance * b.mass * magnitude;
                bodies[j].v[axis] += distance * a.mass * magnitude;
            }
        }
    }
    for body in bodies {
        for axis in 0..3 {
            body.x[axis] += dt * body.v[axis];
        }
    }
}

pub fn n_body(task: &Task) -> Outcome {
    for _ in 0..task.count {
        let mut bodies = black_box(solar_system());
        expect("the energy before", format!("{:.9}", energy(&bodies)), "-0.169075164".to_owned())?;
        (0..1000).for_each(|_| advance(&mut bodies, black_box(0.01)));
        expect("the energy after", format!("{:.9}", energy(&bodies)), "-0.169087605".to_owned())?;
    }
    Ok(())
}

pub fn matrix_scalar(task: &Task) -> Outcome {
    products(task, |a, b, product| {
        for row in 0..SIZE {
            for column in 0..SIZE {
                // A sum in this order cannot be vectorized: rounding would differ.
                product[row * SIZE + column] =
                    (0..SIZE).map(|k| a[row * SIZE + k] * b[k * SIZE + column]).sum();
            }
        }
    })
}

pub fn matrix_avx2(task: &Task) -> Outcome {
    if !(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")) {
        return Err(Stop::Skipped("the CPU has no AVX2 or no FMA".to_owned()));
    }
    products(task, |a, b, product| {
        // SAFETY: the CPU has what the function needs.
        unsafe { product_avx2(a, b, product) }
    })
}

/// `product = a * b`, in blocks of four rows and eight columns.
#[target_feature(enable = "avx2,fma")]
fn product_avx2(a: &[f64], b: &[f64], product: &mut [f64]) {
    const ROWS: usize = 4;
    for row in (0..SIZE).step_by(ROWS) {
        for column in (0..SIZE).step_by(2 * LANES) {
            let mut sums = [[_mm256_setzero_pd(); 2]; ROWS];
            for k in 0..SIZE {
                let b = &b[k * SIZE + column..][..2 * LANES];
                let b: [__m256d; 2] = from_fn(|half| load(&b[half * LANES..]));
                for (i, sums) in sums.iter_mut().enumerate() {
                    let a = _mm256_set1_pd(a[(row + i) * SIZE + k]);
                    sums[0] = _mm256_fmadd_pd(a, b[0], sums[0]);
                    sums[1] = _mm256_fmadd_pd(a, b[1], sums[1]);
                }
            }
            for (i, sums) in sums.iter().enumerate() {
                let to = &mut product[(row + i) * SIZE + column..][..2 * LANES];
                let (low, high) = to.split_at_mut(LANES);
                store(low, sums[0]);
                store(high, sums[1]);
            }
        }
    }
}

#[target_feature(enable = "avx2,fma")]
fn load(from: &[f64]) -> __m256d {
    let from = &from[..LANES];
    // SAFETY: the slice has the four numbers that are read; they need not be aligned.
    unsafe { _mm256_loadu_pd(from.as_ptr()) }
}

#[target_feature(enable = "avx2,fma")]
fn store(to: &mut [f64], vector: __m256d) {
    let to = &mut to[..LANES];
    // SAFETY: the slice has room for four numbers; it need not be aligned.
    unsafe { _mm256_storeu_pd(to.as_mut_ptr(), vector) }
}

/// Multiplies matrices of small whole numbers, so that the result is exact, and checks the sum of the product.
fn products(task: &Task, multiply: impl Fn(&[f64], &[f64], &mut [f64])) -> Outcome {
    let mut random = fastrand::Rng::with_seed(3);
    let mut matrix = || -> Matrix { (0..SIZE * SIZE).map(|_| f64::from(random.i16(-100..100))).collect() };
    let (a, b) = (matrix(), matrix());
    let column_of_a = |k: usize| (0..SIZE).map(|row| a[row * SIZE + k]).sum::<f64>();
    let row_of_b = |k: usize| b[k * SIZE..][..SIZE].iter().sum::<f64>();
    let right: f64 = (0..SIZE).map(|k| column_of_a(k) * row_of_b(k)).sum();
    let mut product = vec![0.0; SIZE * SIZE];
    for _ in 0..task.count {
        multiply(black_box(&a), black_box(&b), black_box(&mut product));
        expect("the sum of the product", product.iter().sum::<f64>(), right)?;
    }
    Ok(())
}

pub fn x87(task: &Task) -> Outcome {
    for _ in 0..task.count {
        let sum = inverse_squares(black_box(TERMS));
        // The rest of the series is between 1 / (n + 1) and 1 / n.
        let rest = std::f64::consts::PI.powi(2) / 6.0 - sum;
        let n = TERMS as f64;
        if !(1.0 / (n + 1.0)..1.0 / n).contains(&rest) {
            return Err(Stop::Failed(format!("the sum of 1 / k² is {sum}")));
        }
    }
    Ok(())
}

/// 1/n² + … + 1/2² + 1/1², with intermediate results in memory as `long double` has them.
fn inverse_squares(n: u64) -> f64 {
    let mut memory = [0u64; 4];
    // SAFETY: it uses the 32 bytes of `memory`; all x87 registers are declared, so they are empty before, and it
    // leaves them empty.
    unsafe {
        asm!(
            "fldz",
            "2:",
            "fstp tbyte ptr [{memory}]",
            "mov qword ptr [{memory} + 16], {k}",
            "fild qword ptr [{memory} + 16]",
            "fmul st(0), st(0)",
            "fld1",
            "fdivrp st(1), st(0)",
            "fld tbyte ptr [{memory}]",
            "faddp st(1), st(0)",
            "sub {k}, 1",
            "jnz 2b",
            "fstp qword ptr [{memory} + 24]",
            memory = in(reg) memory.as_mut_ptr(),
            k = inout(reg) n => _,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            options(nostack),
        );
    }
    f64::from_bits(memory[3])
}
