local function queens(n)
    local columns, up, down, found = {}, {}, {}, 0
    local function place(row)
        if row > n then
            found = found + 1
            return
        end
        for c = 1, n do
            if not (columns[c] or up[row + c] or down[row - c]) then
                columns[c], up[row + c], down[row - c] = true, true, true
                place(row + 1)
                columns[c], up[row + c], down[row - c] = nil, nil, nil
            end
        end
    end
    place(1)
    return found
end

local Point = {}
Point.__index = Point
function Point.new(x, y) return setmetatable({ x = x, y = y }, Point) end
function Point:plus(o) return Point.new(self.x + o.x, self.y + o.y) end

local function points(n)
    local sum = Point.new(0, 0)
    for i = 1, n do sum = sum:plus(Point.new(i % 7, i % 11)) end
    return sum.x * sum.y
end

local function strings(n)
    local parts = {}
    for i = 1, n do parts[#parts + 1] = string.format("%05d:%s", i, string.rep("ab", i % 9)) end
    local text = table.concat(parts, ",")
    local count = 0
    for word in text:gmatch("%d+:([ab]+)") do count = count + #word end
    return count + #text:gsub("ab", "c")
end

local function sorted(n)
    local list, x = {}, 12345
    for i = 1, n do
        x = (x * 1103515245 + 12345) & 0x7fffffff
        list[i] = x
    end
    table.sort(list)
    return list[1] ~ list[n // 2] ~ list[n]
end

print(queens(8), points(300000), strings(20000), sorted(60000))
