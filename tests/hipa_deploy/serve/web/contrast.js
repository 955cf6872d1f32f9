// The contrast of every text that is shown: [[text, ratio], ...].
// Source: WCAG 2.2, the definitions of "relative luminance" and "contrast ratio".
() => {
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const luminance = ([red, green, blue]) => {
    const linear = [red, green, blue].map((level) => {
      const part = level / 255;
      return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const ground = (element) => {
    for (let it = element; it; it = it.parentElement) {
      const colour = numbers(getComputedStyle(it).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const ratios = [];
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].filter((node) => node.nodeType === 3 && node.data.trim());
    const value = element.matches("input:not([type=range], [type=checkbox], [type=radio]), textarea, select");
    // WCAG asks no contrast of what is inactive.
    const inactive = element.closest(":disabled, [aria-disabled=true], option");
    if ((!own.length && !value) || inactive || !element.checkVisibility()) continue;
    const one = luminance(numbers(getComputedStyle(element).color));
    const other = luminance(ground(element));
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    ratios.push([own.map((node) => node.data.trim()).join(" ") || element.id, ratio]);
  }
  return ratios;
}
